"""RULER's question answering (arXiv:2404.06654): SQuAD and HotpotQA, the paragraph that answers among others.

Prompts are those of NVIDIA/RULER; first the other paragraphs of the same article, then random ones. Differs from the
code: no paragraph comes twice, so that a small file ends before a long prompt does.
"""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks._passages import Passages, read_passages
from kvfold.evaluation.tasks.base import Setting, task

BEFORE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n"
)
QUESTION = (
    "\n\nAnswer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {question}"
)
PREFIX = " Answer:"


@task("ruler/qa_1", title="RULER qa_1: SQuAD among other paragraphs", paper="2404.06654")
def qa_1(setting: Setting) -> Iterator[Example]:
    """`data`: SQuAD's dev-v2.0.json (RULER's), or a .jsonl of nq-open with `question, answers, ctxs` as a stand-in."""
    return _answered(setting, "ruler/qa_1", ("*squad*.json", "dev-v*.json", "*nq-open*.jsonl*"))


@task("ruler/qa_2", title="RULER qa_2: HotpotQA among other paragraphs", paper="2404.06654")
def qa_2(setting: Setting) -> Iterator[Example]:
    """`data`: hotpot_dev_distractor_v1.json (RULER's), or a .jsonl of nq-open as a stand-in with one hop."""
    return _answered(setting, "ruler/qa_2", ("*hotpot*.json", "*nq-open*.jsonl*"))


def _answered(setting: Setting, name: str, patterns: tuple[str, ...]) -> Iterator[Example]:
    """Questions in the order of the file; 500 in the paper, 20 here where none are asked for."""
    passages = read_passages(setting.data, name, patterns)
    return filled(
        setting,
        name,
        lambda index, units: _example(setting, name, passages, index, units),
        most=len(passages.texts),
        limit=len(passages.questions),
    )


def _example(setting: Setting, name: str, passages: Passages, index: int, units: int) -> Example:
    asked, rng = passages.questions[index], setting.rng(name, index)
    others = list(asked.near)
    rng.shuffle(others)
    here = {*asked.gold, *asked.near}
    far = [place for place in range(len(passages.texts)) if place not in here]
    rng.shuffle(far)
    chosen = [*asked.gold, *others, *far][: max(units, len(asked.gold))]
    rng.shuffle(chosen)
    documents = [f"Document {place}:\n{passages.texts[one]}" for place, one in enumerate(chosen, start=1)]
    query = Query(QUESTION.format(question=asked.text), asked.answers, "contains_any", PREFIX, 32)
    info = {"documents": len(chosen), "depth": chosen.index(asked.gold[0]) / max(len(chosen) - 1, 1)}
    return Example(str(index), BEFORE + "\n\n".join(documents), (query,), info=info)
