"""What a task is judged by: one number a question, how numbers are put together, and which way is better."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvfold.evaluation.metrics import Scores, get_metric, mean_score
from kvfold.evaluation.report.records import ResultRecord, Text


@dataclass(frozen=True)
class Measure:
    """A column of the report. `pool` puts many questions' scores together where that is not the mean of `value`.

    `macro`: a score of 0 to 100 that enters the average over tasks.
    """

    label: str
    task: str
    metric: str
    unit: str
    higher: bool
    macro: bool
    value: Callable[[Scores], float] = field(repr=False)
    pool: Callable[[Sequence[Scores]], float] | None = field(default=None, repr=False)
    terms: Callable[[Scores], tuple[float, float]] | None = field(default=None, repr=False)
    """See `Metric.terms`; None: every question weighs alike."""

    def total(self, scores: Sequence[Scores]) -> tuple[float, float]:
        """What an example's questions add to a sum, and to the weight under it."""
        each = [(self.value(s), 1.0) if self.terms is None else self.terms(s) for s in scores]
        return float(sum(value for value, _ in each)), float(sum(weight for _, weight in each))

    def scores(self, record: ResultRecord, text: Text) -> list[Scores]:
        """Of the record's questions, those that this measure is about."""
        return [
            answer.scores for answer, query in zip(record.answers, text.queries, strict=True)
            if query.metric == self.metric
        ]  # fmt: skip


def _need(name: str, scores: Scores, metric: str) -> float:
    if name not in scores:
        raise ValueError(f"scores={dict(scores)!r} of metric {metric} must have {name!r}")
    return scores[name]


def measures_of(task: str, metric: str, label: str) -> list[Measure]:
    """The measures of a task's metric: agreement has two, KL and equal greedy tokens. Raises ValueError."""
    info = get_metric(metric)
    if metric == "agreement":
        return [
            Measure(label, task, metric, "KL", False, False, lambda scores: _need("kl", scores, metric)),
            Measure(
                f"{label}: top-1", task, metric, "top-1", True, False,
                lambda scores: 100.0 * _need("top1", scores, metric),
            ),
        ]  # fmt: skip
    if info.aggregate is mean_score:
        return [
            Measure(label, task, metric, "score", True, True, lambda scores: 100.0 * _need("score", scores, metric))
        ]
    unit = "score" if info.higher else metric
    return [
        Measure(
            label, task, metric, unit, info.higher, info.higher, lambda s: info.aggregate([s]), info.aggregate,
            info.terms,
        )
    ]  # fmt: skip


def all_measures(texts: Iterable[Text]) -> list[Measure]:
    """The measures of all tasks by name; a task with several metrics has one for each, named after it."""
    metrics: dict[str, dict[str, None]] = {}
    for text in texts:
        metrics.setdefault(text.task, {}).update(dict.fromkeys(query.metric for query in text.queries))
    found: list[Measure] = []
    for task in sorted(metrics):
        for metric in metrics[task]:
            found += measures_of(task, metric, task if len(metrics[task]) == 1 else f"{task} [{metric}]")
    return sorted(found, key=lambda measure: (not measure.macro, measure.label))
