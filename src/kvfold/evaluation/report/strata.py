"""Results sorted into strata: what each contender reached on one task at one length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kvfold.evaluation.metrics import Scores
from kvfold.evaluation.report.measures import Measure, all_measures
from kvfold.evaluation.report.reading import Results
from kvfold.evaluation.report.records import ResultRecord
from kvfold.evaluation.statistics import bootstrap_means, resampled_indices

AS_PUBLISHED = "as published"
RESAMPLES = 1000


@dataclass(frozen=True)
class Setup:
    """What is never averaged over: a report has one section for each."""

    model: str
    dtype: str
    protocol: str


@dataclass(frozen=True)
class ReportContender:
    """A method at a budget; None is for the reference, the full cache."""

    method: str
    budget: float | int | None

    @property
    def reference(self) -> bool:
        """Whether this is the full cache."""
        return self.method == "full"


@dataclass(frozen=True)
class Sample:
    """What a contender reached in a stratum: each example's mean, all of them together, and bootstrap draws of that."""

    values: Mapping[str, float]
    totals: Mapping[str, tuple[float, float]]
    """What each example adds to the sum that all are judged by, and to the weight under it."""
    point: float
    draws: NDArray[np.float64] = field(repr=False)
    records: Sequence[ResultRecord] = field(repr=False)
    failed: int = 0


Stratum = Mapping[ReportContender, Sample]


@dataclass(frozen=True)
class Strata:
    """All samples, by setup, measure label, length and contender; with the orders in which all of these are shown."""

    samples: Mapping[Setup, Mapping[str, Mapping[str, Stratum]]]
    measures: Mapping[str, Measure]
    lengths: tuple[str, ...]
    contenders: tuple[ReportContender, ...]


def length_name(length: int | None) -> str:
    """A length as it is printed."""
    return AS_PUBLISHED if length is None else str(length)


def budget_order(budget: float | int | None) -> tuple[int, float]:
    """None first, then fractions, then tokens."""
    return (0, 0.0) if budget is None else (1 if isinstance(budget, float) else 2, float(budget))


def _sample(
    measure: Measure, scored: Mapping[str, list[Scores]], records: Sequence[ResultRecord], failed: int, seed: int
) -> Sample:
    """Examples are resampled, their questions staying together; contenders of a seed get the same draws."""
    groups = list(scored.values())
    values = {name: fmean(map(measure.value, scores)) for name, scores in scored.items()}
    totals = {name: measure.total(scores) for name, scores in scored.items()}
    if not groups:
        return Sample(values, totals, float("nan"), np.full(RESAMPLES, np.nan), records, failed)
    if measure.pool is None:
        sums, sizes = [sum(map(measure.value, group)) for group in groups], [len(group) for group in groups]
        draws = bootstrap_means(sums, sizes, resamples=RESAMPLES, seed=seed)
        return Sample(values, totals, sum(sums) / sum(sizes), draws, records, failed)
    draws = np.array([
        measure.pool([scores for index in row for scores in groups[index]])
        for rows in resampled_indices(len(groups), RESAMPLES, seed) for row in rows
    ])  # fmt: skip
    point = measure.pool([scores for group in groups for scores in group])
    return Sample(values, totals, point, draws, records, failed)


def stratify(results: Results) -> Strata:
    """Sort the records and measure every stratum. Raises ValueError where scores are not those of their metric."""
    measures = {measure.label: measure for measure in all_measures(results.texts.values())}
    by_task: dict[str, list[Measure]] = {}
    for measure in measures.values():
        by_task.setdefault(measure.task, []).append(measure)
    sorted_records: dict[Setup, dict[str, dict[str, dict[ReportContender, list[ResultRecord]]]]] = {}
    for record in results.records:
        setup = Setup(record.model, record.dtype, record.protocol)
        contender = ReportContender(record.method, record.budget)
        metrics = {query.metric for query in results.text(record).queries}
        for measure in by_task[record.task]:
            if measure.metric in metrics:
                place = sorted_records.setdefault(setup, {}).setdefault(measure.label, {})
                place.setdefault(length_name(record.length), {}).setdefault(contender, []).append(record)

    def sample(measure: Measure, length: str, records: Sequence[ResultRecord]) -> Sample:
        good = [record for record in records if record.error is None]
        scored = {record.example: measure.scores(record, results.text(record)) for record in good}
        seed = crc32(f"{measure.task} {length}".encode())  # strata are independent: no two share their draws
        return _sample(measure, scored, good, len(records) - len(good), seed)

    samples = {
        setup: {
            label: {
                length: {contender: sample(measures[label], length, records) for contender, records in stratum.items()}
                for length, stratum in by_length.items()
            }
            for label, by_length in by_label.items()
        }
        for setup, by_label in sorted_records.items()
    }
    lengths = sorted({record.length for record in results.records}, key=lambda n: (n is None, n or 0))
    methods = list(dict.fromkeys(record.method for record in results.records))
    contenders = sorted(
        {ReportContender(record.method, record.budget) for record in results.records},
        key=lambda c: (not c.reference, methods.index(c.method), budget_order(c.budget)),
    )
    return Strata(samples, measures, tuple(map(length_name, lengths)), tuple(contenders))
