"""The registry of metrics: a metric scores one answer, and says how scores of many are put together."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean

from kvfold.evaluation.examples import Query

Scores = Mapping[str, float]
Score = Callable[[str, Query], float | Scores]
Aggregate = Callable[[Sequence[Scores]], float]


def mean_score(scores: Sequence[Scores]) -> float:
    """100 times the mean of `score`."""
    return 100.0 * fmean(each["score"] for each in scores)


@dataclass(frozen=True)
class Metric:
    """`score` of one prediction, 0 to 1 (or several numbers by name); `aggregate` of many, what tables print."""

    name: str
    title: str
    score: Score = field(repr=False)
    aggregate: Aggregate = field(default=mean_score, repr=False)
    higher: bool = True
    terms: Callable[[Scores], tuple[float, float]] | None = field(default=None, repr=False)
    """What an answer adds to a sum, and to the weight under it, where `aggregate` grows with the quotient of both."""

    def __call__(self, prediction: str, query: Query) -> dict[str, float]:
        found = self.score(prediction, query)
        return dict(found) if isinstance(found, Mapping) else {"score": float(found)}


metrics: dict[str, Metric] = {}


def metric(
    name: str, *, title: str, aggregate: Aggregate = mean_score, higher: bool = True,
    terms: Callable[[Scores], tuple[float, float]] | None = None,
) -> Callable[[Score], Score]:  # fmt: skip
    """Register a function `(prediction, query) -> score or scores` under a name."""

    def register(score: Score) -> Score:
        if name in metrics:
            raise ValueError(f"metric {name!r} is registered twice")
        metrics[name] = Metric(name, title, score, aggregate, higher, terms)
        return score

    return register


@cache
def _scan() -> None:
    package = importlib.import_module("kvfold.evaluation.metrics")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "base" and not module.name.startswith("_"):
            importlib.import_module(f"kvfold.evaluation.metrics.{module.name}")


def get_metric(name: str) -> Metric:
    """A metric by its name. Raises ValueError that lists what there is."""
    _scan()
    if name not in metrics:
        raise ValueError(f"metric={name!r} is unknown; there are {', '.join(sorted(metrics))}")
    return metrics[name]
