"""SCBench: 12 sets of sessions that ask several queries about one shared context (arXiv:2412.10319), as published.

Every turn is a query of one example. All queries have the form that the official multi-request mode gives them, so
that a context is the same whichever turn comes first. Differs from the official script in math_find, where it puts
the first turn's query in front of the numbers: here every query brings its own, behind them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord, letter_of
from kvfold.evaluation.benchmarks._sets import register_sets
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting


@dataclass(frozen=True)
class TurnKind:
    """How the turns of one kind are asked and scored."""

    metric: str
    max_new_tokens: int
    ask: str = "{input}"


@dataclass(frozen=True)
class SCBenchSet:
    """`before` the context; and the kinds of turns by the name of their sub-task ("" where a set has one kind)."""

    turns: Mapping[str, TurnKind]
    before: str = ""


def _one(metric: str, max_new_tokens: int, before: str = "", ask: str = "{input}") -> SCBenchSet:
    return SCBenchSet({"": TurnKind(metric, max_new_tokens, ask)}, before)


# ruff: noqa: RUF001 -- the Chinese prompts have their own punctuation
_CHOICES = "Question: {input}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\nThe the correct answer is"  # the stutter is theirs
_REPOQA = (
    "Based on the function description and code context, please retrieve and repeat the exact described function "
    "from the code context in a code block wrapped by ```:\n\n"
)
_KV = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_BOOK = "Read the book and answer the question."

SETS = {
    "kv": _one("contains", 150, _KV),
    "prefix_suffix": _one("contains", 150),
    "vt": _one("variables", 30),
    "repoqa": _one("repoqa", 1024, _REPOQA),
    "qa_eng": _one("qa", 40, f"{_BOOK} Be very concise in your answer.\n\n", "Question: {input}\nAnswer:"),
    "qa_chn": _one("qa_zh", 40, "阅读以下书籍然后回答问题。\n\n", "问题：{input}\n答案："),
    "choice_eng": _one("choice", 40, f"{_BOOK}\n\n", _CHOICES),
    "mf": _one("math_find", 5, ask="{prefix}\n\n{input}"),
    "many_shot": _one("qa", 10),
    "summary": _one("summary", 200),
    "summary_with_needles": SCBenchSet(
        {"scbench_summary": TurnKind("summary", 800), "scbench_passkey": TurnKind("passkey", 15)}
    ),
    "repoqa_and_kv": SCBenchSet({"scbench_repoqa": TurnKind("repoqa", 1024), "scbench_kv": TurnKind("contains", 80)}),
}


def _examples(setting: Setting, name: str, entry: SCBenchSet, *, turns: int = 5) -> Iterator[Example]:
    """`turns`: how many queries of each session are asked at most."""
    if turns < 1:
        raise ValueError(f"turns={turns} must be at least 1")
    names = (f"scbench_{name}.jsonl", f"data/scbench_{name}.jsonl", f"scbench_{name}/*.parquet")
    source = Source(names, "microsoft/SCBench", config=f"scbench_{name}")
    sessions: Iterator[PublishedRecord] = records(setting, source)
    needles: dict[str, dict[str, str]] = {}
    if "repoqa" in name:  # an answer is compared with every function asked for in its repository
        sessions = iter(kept := list(sessions))
        needles = _needles(kept)
    for index, record in enumerate(sessions):
        queries = tuple(_query(record, turn, entry, needles) for turn in islice(record.records("multi_turns"), turns))
        yield Example(str(index), entry.before + _context(record), queries)


def _context(record: PublishedRecord) -> str:
    """The shared context; a list of numbers is printed as Python prints it."""
    name = "context" if record.fields.get("context") is not None else "input"
    value = record.need(name)
    return str(list(value)) if isinstance(value, list | tuple) else record.text(name)


def _query(
    record: PublishedRecord, turn: PublishedRecord, entry: SCBenchSet, needles: Mapping[str, dict[str, str]]
) -> Query:
    kind = turn.text("task") if len(entry.turns) > 1 else ""
    if kind not in entry.turns:
        raise turn.wrong("task", f"is {kind!r}; it must be one of {', '.join(map(repr, entry.turns))}")
    how = entry.turns[kind]
    slots, answers = {"input": turn.text("input")}, turn.strings("answer")
    if how.metric == "math_find":
        slots["prefix"] = _what_is(turn)
    if how.metric == "choice":
        choices = turn.options("options")
        slots |= dict(zip("ABCD", choices, strict=True))
        answers = (answers[0], letter_of(turn, choices, answers[0]))
    info: dict[str, Any] = {"task": kind.removeprefix("scbench_")} if kind else {}
    if how.metric == "repoqa":
        repository = record.text("repo")
        info |= {"lang": record.text("lang"), "name": turn.text("name"), "needles": needles[repository]}
    return Query(f"\n\n{how.ask.format(**slots)}", answers, f"scbench/{how.metric}", "", how.max_new_tokens, info=info)


def _what_is(turn: PublishedRecord) -> str:
    """ "The largest number is ..." to "What is the largest number?"."""
    found = re.search(r"The .+ is", turn.text("input"))
    if found is None:
        raise turn.wrong("input", "has no 'The ... is', which the question is made from")
    return f"What is {found[0][:-3].lower()}?"


def _needles(sessions: list[PublishedRecord]) -> dict[str, dict[str, str]]:
    """By repository: the functions that are asked for, by name."""
    found: dict[str, dict[str, str]] = {}
    for record in sessions:
        for turn in record.records("multi_turns"):
            if turn.fields.get("name") is not None:
                found.setdefault(record.text("repo"), {})[turn.text("name")] = turn.strings("answer")[0]
    return found


register_sets("scbench_data", SETS, _examples, title="SCBench {}, as published", paper="2412.10319")
