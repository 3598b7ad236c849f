"""LooGLE: questions on papers, articles and scripts of more than 24 thousand tokens (arXiv:2311.04939)."""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.benchmarks._sets import register_sets
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting

_QUESTION = "Please answer the question based on the long texts below. \n"
_CLOZE = (
    "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the question "
    "could be an entity of Person, Location or Organiocation. The same masks represent the same entity. Output a json "
    "format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine','<mask-2>': 'Bethel Horizon'}\n"
)


@dataclass(frozen=True)
class LooGLESet:
    """What stands `before` and `after` the document, byte for byte as published; and the metrics to choose from."""

    before: str
    after: str
    metrics: tuple[str, ...]
    max_new_tokens: int


_OVERLAP = ("rouge", "bleu")
SETS = {
    "shortdep_qa": LooGLESet(_QUESTION, "\nQuestion: {Q}\nAnswer: ", _OVERLAP, 300),
    "longdep_qa": LooGLESet(_QUESTION, "\nQuestion: {Q}\nAnswer: ", _OVERLAP, 500),
    "longdep_summarization": LooGLESet(
        "Please generate a summary of the below paper. \n", "\n Summarization: ", _OVERLAP, 500
    ),
    "shortdep_cloze": LooGLESet(
        _CLOZE, "\n Question: {Q} What are the masked entities? \nAnswer:", ("cloze_exact", "cloze_partial"), 50
    ),
}


def _examples(setting: Setting, name: str, entry: LooGLESet, *, metric: str | None = None) -> Iterator[Example]:
    """`metric`: without "loogle/"; None is the first of the set's. ROUGE here is recall, which long answers raise."""
    metric = entry.metrics[0] if metric is None else metric
    if metric not in entry.metrics:
        raise ValueError(f"metric={metric!r} must be one of {', '.join(map(repr, entry.metrics))}")
    names = (f"{name}.jsonl", f"data/{name}.jsonl", f"LooGLE-testdata/{name}.jsonl", f"{name}/*.parquet")
    for index, record in enumerate(records(setting, Source(names, "bigainlco/LooGLE", config=name))):
        queries = tuple(_query(pair, entry, metric) for pair in _pairs(record))
        info = {"title": record.text("title")}
        yield Example(str(index), entry.before + record.text("input"), queries, info=info)


def _pairs(record: PublishedRecord) -> list[PublishedRecord]:
    """Questions and answers, which are published as the text of a Python list; "none" for a summary."""
    pairs = record.need("qa_pairs")
    if pairs == "none":
        return [PublishedRecord(record.where, {"Q": "", "A": record.text("output")})]
    if isinstance(pairs, str):
        try:
            pairs = ast.literal_eval(pairs)
        except (ValueError, SyntaxError):
            raise record.wrong("qa_pairs", "is no Python list of questions") from None
    return PublishedRecord(record.where, {"qa_pairs": pairs}).records("qa_pairs")


def _query(pair: PublishedRecord, entry: LooGLESet, metric: str) -> Query:
    answer = pair.need("A")
    text = json.dumps(answer, ensure_ascii=False) if isinstance(answer, dict) else pair.strings("A")[0]
    info = {"kind": pair.text("type")} if pair.fields.get("type") else {}
    ask = entry.after.replace("{Q}", pair.text("Q"))
    return Query(ask, (text,), f"loogle/{metric}", "", entry.max_new_tokens, info=info)


register_sets("loogle", SETS, _examples, title="LooGLE {}", paper="2311.04939")
