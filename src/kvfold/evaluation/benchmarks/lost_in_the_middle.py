"""Lost in the Middle: does an answer's place in the context decide whether it is found (arXiv:2307.03172)?

The files are in the repository nelson-liu/lost-in-the-middle (kv_retrieval_data, qa_data), not on the hub.
"""

from collections.abc import Iterator
from itertools import islice

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting, task

PAPER = "2307.03172"
REPOSITORY = "github.com/nelson-liu/lost-in-the-middle"
KV = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
QA = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)


@task("lostmiddle/kv", title="Lost in the Middle: look up one of many UUIDs", paper=PAPER, sized=False)
def kv(setting: Setting, *, pairs: int = 75, gold_index: int | None = None) -> Iterator[Example]:
    """`pairs`: which file of a folder, 75, 140 or 300. `gold_index`: where the asked pair goes (None: as published)."""
    names = tuple(f"{folder}kv-retrieval-{pairs}{end}" for folder in ("", "kv_retrieval_data/") for end in _ENDS)
    source = Source(names, REPOSITORY, hub=False)
    for index, record in enumerate(islice(records(setting, source), setting.samples)):
        yield _lookup(record, index, gold_index)


_ENDS = ("_keys.jsonl.gz", "_keys.jsonl", ".jsonl.gz", ".jsonl")


def _lookup(record: PublishedRecord, index: int, gold_index: int | None) -> Example:
    rows = record.need("ordered_kv_records")
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
        raise record.wrong("ordered_kv_records", "must be a list of pairs of key and value")
    asked = [record.text("key"), record.text("value")]
    if asked not in rows:
        raise record.wrong("ordered_kv_records", f"has no pair {asked}")
    place = rows.index(asked) if gold_index is None else gold_index
    if not 0 <= place < len(rows):
        raise ValueError(f"gold_index={gold_index} must be in 0..{len(rows) - 1}, for {len(rows)} pairs")
    rest = [row for row in rows if row != asked]
    lines = [f'"{key}": "{value}"' for key, value in [*rest[:place], asked, *rest[place:]]]
    query = Query(f'\n\nKey: "{asked[0]}"\nCorresponding value:', (asked[1],), "contains_all", max_new_tokens=100)
    context = KV + "{" + ",\n ".join(lines) + "}"
    return Example(str(index), context, (query,), info={"gold_index": place, "depth": place / max(len(rows) - 1, 1)})


@task("lostmiddle/qa", title="Lost in the Middle: one passage of many answers", paper=PAPER, sized=False)
def qa(setting: Setting, *, documents: int = 10, gold_index: int | None = None) -> Iterator[Example]:
    """`documents` passages, of which one answers; `gold_index`: its place (None: each in turn).

    Differs from the paper where the file has the answering passages alone (nq-open-oracle): the others are drawn from
    those of other questions, not from a search, so they are easier to tell apart.
    """
    if documents < 2:
        raise ValueError(f"documents={documents} must be at least 2")
    if gold_index is not None and not 0 <= gold_index < documents:
        raise ValueError(f"gold_index={gold_index} must be in 0..{documents - 1}, for documents={documents}")
    names = (
        f"qa_data/{documents}_total_documents/*.jsonl.gz",
        "nq-open-oracle.jsonl*",
        "qa_data/nq-open-oracle.jsonl*",
    )
    rows = list(records(setting, Source(names, REPOSITORY, hub=False)))
    pool = [passage for row in rows for passage in _passages(row) if passage.fields.get("isgold")]
    for index, row in enumerate(rows[: setting.samples]):
        place = index % documents if gold_index is None else gold_index
        yield _question(row, index, _mix(setting, row, index, pool, documents - 1), place)


def _passages(row: PublishedRecord) -> list[PublishedRecord]:
    return row.records("ctxs")


def _mix(
    setting: Setting, row: PublishedRecord, index: int, pool: list[PublishedRecord], count: int
) -> list[PublishedRecord]:
    """The gold passage, then `count` that hold no answer: the row's own ones first, then others' in random order."""
    gold = [passage for passage in _passages(row) if passage.fields.get("isgold")]
    if len(gold) != 1:
        raise row.wrong("ctxs", f"has {len(gold)} passages with 'isgold'; it must have one")
    answers = [answer.lower() for answer in row.strings("answers")]
    own = [passage for passage in _passages(row) if not passage.fields.get("isgold")]
    others = setting.rng("lostmiddle/qa", index).sample(pool, len(pool))
    seen, chosen = {gold[0].text("text")}, list[PublishedRecord]()
    for passage in (*own, *others):
        text = passage.text("text")
        if len(chosen) < count and text not in seen and not any(answer in text.lower() for answer in answers):
            seen.add(text)
            chosen.append(passage)
    if len(chosen) < count:
        raise ValueError(
            f"documents={count + 1} must be at most {len(chosen) + 1}: {row.where} finds no more to mix in"
        )
    return [gold[0], *chosen]


def _question(row: PublishedRecord, index: int, passages: list[PublishedRecord], place: int) -> Example:
    gold, *rest = passages
    ordered = [*rest[:place], gold, *rest[place:]]
    lines = [f"Document [{n}](Title: {p.text('title')}) {p.text('text')}" for n, p in enumerate(ordered, start=1)]
    query = Query(
        f"\n\nQuestion: {row.text('question')}\nAnswer:",
        row.strings("answers"),
        "lostmiddle/best_subspan_em",
        max_new_tokens=100,
    )
    info = {"gold_index": place, "depth": place / (len(ordered) - 1)}
    return Example(str(index), QA + "\n".join(lines), (query,), info=info)
