"""The two scores of longctx_bench's passkey test (arXiv:2407.01527)."""

from difflib import SequenceMatcher

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import metric


@metric("longctx/exact", title="whether the prediction contains the key (longctx_bench)")
def exact(prediction: str, query: Query) -> float:
    """Of any answer, both in a normal form whose articles vanish without leaving a blank."""
    found = _text.normalize(prediction, gap="")
    return _text.best(lambda _, answer: float(_text.normalize(answer, gap="") in found), prediction, query)


@metric("longctx/partial", title="longest common substring with the key, as a share of the key (longctx_bench)")
def partial(prediction: str, query: Query) -> float:
    """Of the texts as they stand. Random digits share a few by chance, so the worst score is above 0."""

    def score(found: str, answer: str) -> float:
        if not answer:
            raise ValueError(f"query.answers={query.answers!r} must not hold an empty key")
        return SequenceMatcher(None, answer, found, autojunk=False).find_longest_match().size / len(answer)

    return _text.best(score, prediction, query)
