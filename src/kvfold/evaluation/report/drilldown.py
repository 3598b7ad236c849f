"""The single examples of the page: a row for each result, and the texts that they are about."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from kvfold.evaluation.report.reading import Results
from kvfold.evaluation.report.records import ResultRecord, Text
from kvfold.evaluation.report.strata import Setup, Strata, length_name

TEXT_LIMIT = 20_000_000
"""Characters of contexts and predictions that go into a page."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def kept_digits(kept: Sequence[float]) -> str:
    """Shares in steps of 1/35, one character each; more than all is all."""
    return "".join(DIGITS[round(min(share, 1.0) * (len(DIGITS) - 1))] for share in kept)


def _chosen(results: Results, limit: int) -> list[Text]:
    """The examples whose texts go in: one after another from each task and length, until the limit is reached."""
    used: dict[object, int] = {}
    for record in results.records:
        size = sum(len(answer.prediction) for answer in record.answers)
        used[record.text_key] = used.get(record.text_key, 0) + size
    queues: dict[tuple[str, str, int | None], list[Text]] = {}
    for key, text in results.texts.items():
        if key in used:
            queues.setdefault((text.model, text.task, text.length), []).append(text)
    chosen: list[Text] = []
    contexts, total = set[str](), 0
    for turn in zip_longest(*queues.values()):
        for text in turn:
            if text is None:
                continue
            size = used[text.model, text.task, text.length, text.example]
            size += 0 if text.context in contexts else len(text.context)
            if total + size > limit:
                continue  # a shorter one may still fit
            total += size
            contexts.add(text.context)
            chosen.append(text)
    return chosen


def _about(text: Text, context: int | None) -> dict[str, Any]:
    queries = [
        {"text": q.text, "prefix": q.prefix, "answers": q.answers, "metric": q.metric, "info": q.info}
        for q in text.queries
    ]  # fmt: skip
    shown = queries if context is not None else []
    return {
        "task": text.task, "length": length_name(text.length), "example": text.example, "info": text.info,
        "queries": shown, "context": context,
    }  # fmt: skip


def _result(record: ResultRecord, setup: int, example: int, value: Any, texts: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "setup": setup, "example": example, "method": record.method, "budget": record.budget, "value": value
    }  # fmt: skip
    if record.error is not None:
        return {**row, "error": record.error}
    return {
        **row, "kept_tokens": record.kept_tokens, "prompt_tokens": record.prompt_tokens,
        "ratio": record.nbytes / record.full_nbytes, "kept": kept_digits(record.kept),
        "answers": [
            {"prediction": answer.prediction if texts else None, "scores": answer.scores, "tokens": answer.tokens}
            for answer in record.answers
        ],
    }  # fmt: skip


def drilldown(results: Results, strata: Strata, setups: Sequence[Setup], limit: int = TEXT_LIMIT) -> Mapping[str, Any]:
    """`contexts` (each once), `examples` and `rows` for the page. A row's value is its task's first measure.

    Every result has its row; beyond `limit` characters examples are listed with their scores and without their texts.
    """
    texts = {id(text) for text in _chosen(results, limit)}
    contexts: dict[str, int] = {}
    numbers: dict[object, int] = {}
    examples: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    first = {measure.task: measure for measure in reversed(list(strata.measures.values()))}
    for record in results.records:
        text = results.text(record)
        shown = id(text) in texts
        if record.text_key not in numbers:
            numbers[record.text_key] = len(examples)
            examples.append(_about(text, contexts.setdefault(text.context, len(contexts)) if shown else None))
        scores = [] if record.error is not None else first[record.task].scores(record, text)
        values = [first[record.task].value(each) for each in scores]
        value = sum(values) / len(values) if values else None
        setup = setups.index(Setup(record.model, record.dtype, record.protocol))
        rows.append(_result(record, setup, numbers[record.text_key], value, shown))
    return {"contexts": list(contexts), "examples": examples, "rows": rows}
