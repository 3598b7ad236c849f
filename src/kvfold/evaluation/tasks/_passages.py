"""Questions with the paragraphs that answer them, of SQuAD, HotpotQA or nq-open."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PassageQuestion:
    """`gold`: paragraphs that are needed, `near`: others of the same article; both indices of `Passages.texts`."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Passages:
    texts: tuple[str, ...]
    questions: tuple[PassageQuestion, ...]


def read_passages(data: Path | None, name: str, patterns: Iterable[str]) -> Passages:
    """What a file holds, or the first file of a folder that has one of the patterns. Raises ValueError for others."""
    wanted = ", ".join(patterns)
    if data is None:
        raise ValueError(f"data=None: task {name} needs a file, or a folder with one of {wanted}")
    found = [data] if data.is_file() else [path for pattern in patterns for path in sorted(data.rglob(pattern))]
    if not found:
        raise ValueError(f"data={str(data)!r}: task {name} needs a file, or a folder with one of {wanted}")
    return _read(found[0])


@cache
def _read(path: Path) -> Passages:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    try:
        rows: Any = json.loads(text) if ".jsonl" not in path.name else list(map(json.loads, text.splitlines()))
        if isinstance(rows, dict):
            return _squad(rows["data"])
        return _hotpot(rows) if "context" in rows[0] else _nq_open(rows)
    except (KeyError, TypeError, IndexError, json.JSONDecodeError) as error:
        kinds = "SQuAD, HotpotQA or nq-open"
        raise ValueError(f"data={str(path)!r} is no file of {kinds}: {type(error).__name__}: {error}") from None


def _passages(rows: list[tuple[str, tuple[str, ...], list[str], list[str]]]) -> Passages:
    """From (question, answers, gold paragraphs, near ones)."""
    place = {text: i for i, text in enumerate(sorted({text for row in rows for text in (*row[2], *row[3])}))}
    questions = tuple(
        PassageQuestion(
            text,
            tuple(dict.fromkeys(answer.strip() for answer in answers)),
            tuple(dict.fromkeys(place[each] for each in gold)),
            tuple(dict.fromkeys(place[each] for each in near if each not in gold)),
        )
        for text, answers, gold, near in rows
        if any(answers)
    )
    return Passages(tuple(place), questions)


def _squad(articles: list[dict[str, Any]]) -> Passages:
    """Unanswerable questions are left out, as RULER does."""
    rows = []
    for article in articles:
        near = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = tuple(answer["text"] for answer in asked["answers"])
                if not asked.get("is_impossible", False):
                    rows.append((asked["question"], answers, [paragraph["context"]], near))
    return _passages(rows)


def _hotpot(rows: list[dict[str, Any]]) -> Passages:
    """All ten paragraphs of a question count as its own, as in RULER."""
    return _passages(
        [
            (row["question"], (row["answer"],), [f"{title}\n{''.join(parts)}" for title, parts in row["context"]], [])
            for row in rows
        ]
    )


def _nq_open(rows: list[dict[str, Any]]) -> Passages:
    """Lost in the Middle's form: the paragraphs that are marked as gold, titles in front as in HotpotQA's."""
    return _passages(
        [
            (row["question"], tuple(row["answers"]),
             [f"{each['title']}\n{each['text']}" for each in row["ctxs"] if each.get("isgold", True)],
             [f"{each['title']}\n{each['text']}" for each in row["ctxs"]])
            for row in rows
        ]
    )  # fmt: skip
