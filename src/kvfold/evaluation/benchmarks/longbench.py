"""LongBench: 21 sets of questions, summaries, examples and code; LongBench-E: 13 of them by length (arXiv:2308.14508).

Prompts, answer lengths and the choice of chat template are those of the official pred.py. The context ends where the
prompt's {context} ends, so that a method which compresses it has not seen the question.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._longbench_prompts import PROMPTS
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.benchmarks._sets import register_sets
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting

FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Sets of which only the first line of an answer counts."""
NO_CHAT = (*FIRST_LINE, "lcc", "repobench-p")


@dataclass(frozen=True)
class LongBenchSet:
    metric: str
    max_new_tokens: int


SETS = {
    "narrativeqa": LongBenchSet("f1", 128),
    "qasper": LongBenchSet("f1", 128),
    "multifieldqa_en": LongBenchSet("f1", 64),
    "multifieldqa_zh": LongBenchSet("f1_zh", 64),
    "hotpotqa": LongBenchSet("f1", 32),
    "2wikimqa": LongBenchSet("f1", 32),
    "musique": LongBenchSet("f1", 32),
    "dureader": LongBenchSet("rouge_zh", 128),
    "gov_report": LongBenchSet("rouge", 512),
    "qmsum": LongBenchSet("rouge", 512),
    "multi_news": LongBenchSet("rouge", 512),
    "vcsum": LongBenchSet("rouge_zh", 512),
    "trec": LongBenchSet("classification", 64),
    "triviaqa": LongBenchSet("f1", 32),
    "samsum": LongBenchSet("rouge", 128),
    "lsht": LongBenchSet("classification", 64),
    "passage_count": LongBenchSet("count", 32),
    "passage_retrieval_en": LongBenchSet("retrieval", 32),
    "passage_retrieval_zh": LongBenchSet("retrieval_zh", 32),
    "lcc": LongBenchSet("code", 64),
    "repobench-p": LongBenchSet("code", 64),
}

BY_LENGTH = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
"""The sets of LongBench-E."""


def _source(file: str) -> Source:
    names = (f"{file}.jsonl", f"data/{file}.jsonl", f"data.zip!{file}.jsonl", f"{file}/*.parquet")
    return Source(names, "THUDM/LongBench", file=f"data.zip!data/{file}.jsonl")


def _example(record: PublishedRecord, index: int, name: str, entry: LongBenchSet) -> Example:
    before, _, after = PROMPTS[name].partition("{context}")
    classes = {"classes": record.strings("all_classes")} if entry.metric == "classification" else {}
    first = {"first_line": True} if name in FIRST_LINE else {}
    query = Query(
        after.replace("{input}", record.text("input")),
        record.strings("answers"),
        metric=f"longbench/{entry.metric}",
        max_new_tokens=entry.max_new_tokens,
        stop=("\n",) if name == "samsum" else (),
        min_new_tokens=int(name == "samsum"),
        info=classes | first,
    )
    words = record.number("length")
    info = {"published_id": record.text("_id"), "length": words, "length_bin": _bin(words)}
    return Example(str(index), before + record.text("context"), (query,), chat=name not in NO_CHAT, info=info)


def _bin(words: int) -> str:
    """LongBench-E's three lengths, in words."""
    return "0-4k" if words < 4000 else "4-8k" if words < 8000 else "8k+"


def _examples(setting: Setting, name: str, entry: LongBenchSet) -> Iterator[Example]:
    for index, record in enumerate(records(setting, _source(name))):
        yield _example(record, index, name, entry)


def _examples_by_length(setting: Setting, name: str, entry: LongBenchSet) -> Iterator[Example]:
    for index, record in enumerate(records(setting, _source(f"{name}_e"))):
        yield _example(record, index, name, entry)


register_sets("longbench", SETS, _examples, title="LongBench {}", paper="2308.14508")
register_sets(
    "longbench_e",
    {name: SETS[name] for name in BY_LENGTH},
    _examples_by_length,
    title="LongBench-E {}: as many short as long contexts",
    paper="2308.14508",
)
