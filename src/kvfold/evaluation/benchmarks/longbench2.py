"""LongBench v2: 503 multiple-choice questions on texts of 8 thousand to 2 million words (arXiv:2412.15204)."""

from collections.abc import Iterator
from itertools import islice

from kvfold.evaluation.benchmarks._files import Source, records
from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks.base import Setting, task

BEFORE = "Please read the following text and answer the question below.\n\n<text>\n"
AFTER = "\n</text>\n\nWhat is the correct answer to this question: {}\nChoices:\n(A) {}\n(B) {}\n(C) {}\n(D) {}\n\n"
FORM = 'Format your response as follows: "The correct answer is (insert answer here)".'
STEPS = "\n\nLet’s think step by step:"  # noqa: RUF001 -- their apostrophe

SOURCE = Source(("data.json", "longbench2.json*", "*.parquet", "data/*.parquet"), "THUDM/LongBench-v2", "data.json")


@task("longbench2", title="LongBench v2: multiple choice on very long texts", paper="2412.15204", sized=False)
def longbench2(setting: Setting, *, cot: bool = False) -> Iterator[Example]:
    """The official zero-shot prompt, decoded greedily (officially at temperature 0.1).

    `cot`: reason first, in 1,024 tokens. Differs from the official script, which asks a second time for the choice:
    here the form of the answer is asked for before the reasoning, in one call.
    """
    for index, record in enumerate(islice(records(setting, SOURCE), setting.samples)):
        yield _example(record, index, cot)


def _example(record: PublishedRecord, index: int, cot: bool) -> Example:
    parts = [record.text(name).strip() for name in ("question", "choice_A", "choice_B", "choice_C", "choice_D")]
    answer = record.text("answer")
    if answer not in tuple("ABCD"):
        raise record.wrong("answer", f"is {answer!r}; it must be A, B, C or D")
    query = Query(
        AFTER.format(*parts) + FORM + (STEPS if cot else ""),
        (answer,),
        metric="longbench2/choice",
        max_new_tokens=1024 if cot else 128,
    )
    info = {name: record.text(name) for name in ("difficulty", "length", "domain", "sub_domain")}
    context = BEFORE + record.text("context").strip()
    return Example(str(index), context, (query,), info={"published_id": record.text("_id")} | info)
