"""Whether an answer holds what was asked for: the measures of RULER (arXiv:2404.06654)."""

import re

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics.base import metric

_CONTROL = re.compile(r"[\x00-\x1f]")


def _clean(prediction: str) -> str:
    """Control characters to newlines, as RULER's scripts have it."""
    return _CONTROL.sub("\n", prediction).strip().lower()


@metric("contains_all", title="share of the answers that the prediction contains (RULER)")
def contains_all(prediction: str, query: Query) -> float:
    found = _clean(prediction)
    return sum(answer.lower() in found for answer in query.answers) / len(query.answers)


@metric("contains_any", title="whether the prediction contains any of the answers (RULER's QA)")
def contains_any(prediction: str, query: Query) -> float:
    found = _clean(prediction)
    return float(any(answer.lower() in found for answer in query.answers))
