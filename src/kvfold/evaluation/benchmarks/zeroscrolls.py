"""ZeroSCROLLS: ten zero-shot tasks whose documents and queries are marked by character indices (arXiv:2305.14196).

Scored here: the validation split, about 20 examples a task. The references of the test split are private.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.benchmarks._sets import register_sets
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting


@dataclass(frozen=True)
class ZeroScrollsSet:
    metric: str
    max_new_tokens: int


SETS = {
    "gov_report": ZeroScrollsSet("rouge", 1024),
    "summ_screen_fd": ZeroScrollsSet("rouge", 512),
    "qmsum": ZeroScrollsSet("rouge", 512),
    "squality": ZeroScrollsSet("rouge", 512),
    "qasper": ZeroScrollsSet("f1", 128),
    "narrative_qa": ZeroScrollsSet("f1", 64),
    "quality": ZeroScrollsSet("accuracy", 10),
    "musique": ZeroScrollsSet("f1", 32),
    "space_digest": ZeroScrollsSet("exp_similarity", 36),
    "book_sum_sort": ZeroScrollsSet("concordance", 256),
}


def _source(name: str) -> Source:
    inside = f"{name}/validation.jsonl"
    names = (inside, f"{name}.zip!{inside}", f"{name}/validation*.parquet", f"{name}.jsonl")
    return Source(names, "tau/zero_scrolls", file=f"{name}.zip!{inside}")


def _examples(setting: Setting, name: str, entry: ZeroScrollsSet) -> Iterator[Example]:
    grouped: dict[str, list[PublishedRecord]] = {}  # the rows of one id are several references of one example
    for record in records(setting, _source(name)):
        grouped.setdefault(record.text("id"), []).append(record)
    for published_id, rows in grouped.items():
        yield _example(published_id, rows, entry)


def _example(published_id: str, rows: list[PublishedRecord], entry: ZeroScrollsSet) -> Example:
    first = rows[0]
    if any(row.fields.get("output") is None for row in rows):
        raise first.wrong("output", "is missing: the references of the test split are private; score 'validation'")
    prompt, end = first.text("input"), first.number("document_end_index")
    if not 0 < end <= len(prompt):
        raise first.wrong("document_end_index", f"is {end}; it must be in 1..{len(prompt)}, the length of 'input'")
    if any(row.text("input") != prompt for row in rows):
        raise first.wrong("input", f"differs among the rows of id {published_id!r}")
    query = Query(
        prompt[end:],
        tuple(row.text("output") for row in rows),
        metric=f"zeroscrolls/{entry.metric}",
        max_new_tokens=entry.max_new_tokens,
    )
    # The separator tells a model that the document was cut; whoever cuts it puts it there.
    info = {"separator": first.text("truncation_seperator")}
    return Example(published_id, prompt[:end], (query,), cut="end", info=info)


register_sets("zeroscrolls", SETS, _examples, title="ZeroSCROLLS {} (validation split)", paper="2305.14196")
