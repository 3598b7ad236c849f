"""The numbers of the report: score with its interval, memory and time, by task, length and contender."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from kvfold.evaluation.report.measures import Measure
from kvfold.evaluation.report.strata import ReportContender, Sample, Setup, Strata, Stratum
from kvfold.evaluation.statistics import pareto_front, percentile_interval

ALL_TASKS = "average over tasks"
ALL_LENGTHS = "all lengths"


@dataclass(frozen=True)
class Cell:
    """What a contender reached on a task (or the average over tasks) at a length (or the average over lengths).

    `score`, `low`, `high`: None where every example failed. `partial`: over fewer examples than others had. `ratio`:
    bytes over the full cache's; `step`: milliseconds a generated token, `prefill`: seconds a prompt. The fronts: no
    other contender is better at this ratio, or at this step time, or less.
    """

    setup: Setup
    task: str
    length: str
    contender: ReportContender
    unit: str
    higher: bool
    score: float | None
    low: float | None
    high: float | None
    n: int
    failed: int
    partial: bool
    ratio: float | None
    step: float | None
    prefill: float | None
    front_memory: bool = False
    front_time: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON has it, flat."""
        rest = {name: value for name, value in vars(self).items() if name not in ("setup", "contender")}
        return {**vars(self.setup), **vars(self.contender), **rest}


Part = tuple[str, str, Stratum]
"""Task label, length, samples."""


@dataclass(frozen=True)
class Choice:
    """The strata that a task and a length of the filters stand for, grouped by task."""

    setup: Setup
    task: str
    length: str
    unit: str
    higher: bool
    parts: Sequence[Sequence[Part]]

    @property
    def contenders(self) -> list[ReportContender]:
        """Who was tried in any of the strata."""
        return list(dict.fromkeys(contender for group in self.parts for part in group for contender in part[2]))


def choices(strata: Strata) -> Iterator[Choice]:
    """Every task and the average over the scored ones, each at every length and over all of them."""
    for setup, by_label in strata.samples.items():
        labels = [label for label in strata.measures if label in by_label]
        macro = [label for label in labels if strata.measures[label].macro]
        tasks: list[tuple[str, list[str]]] = [(ALL_TASKS, macro)] if macro else []
        for task, members in [*tasks, *((label, [label]) for label in labels)]:
            measure: Measure = strata.measures[members[0]]
            for length in (ALL_LENGTHS, *strata.lengths):
                parts = [
                    [
                        (label, name, stratum)
                        for name, stratum in by_label[label].items()
                        if length in (ALL_LENGTHS, name)
                    ]
                    for label in members
                ]
                if found := [group for group in parts if group]:
                    yield Choice(setup, task, length, measure.unit, measure.higher, found)


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _cell(choice: Choice, contender: ReportContender) -> Cell:
    """Mean over lengths, then over tasks, of points and of bootstrap draws: strata are design, examples are chance."""
    points, draws, samples, partial = [], [], [], False
    for group in choice.parts:
        there: list[Sample] = [stratum[contender] for _, _, stratum in group if contender in stratum]
        samples += there
        alive = [sample for sample in there if sample.values]
        for _, _, stratum in group:
            everyone = {name for sample in stratum.values() for name in sample.values}
            partial |= contender not in stratum or len(stratum[contender].values) < len(everyone)
        if alive:
            points.append(fmean(sample.point for sample in alive))
            draws.append(np.mean([sample.draws for sample in alive], axis=0))
    low, high = percentile_interval(np.mean(draws, axis=0)) if draws else (None, None)
    records = [record for sample in samples for record in sample.records]
    timed = [record for record in records if record.decode_tokens > 0]
    seconds, tokens = sum(r.decode_seconds for r in timed), sum(r.decode_tokens for r in timed)
    return Cell(
        choice.setup, choice.task, choice.length, contender, choice.unit, choice.higher,
        score=_mean(points), low=low, high=high, n=len(records),
        failed=sum(sample.failed for sample in samples), partial=partial or any(s.failed for s in samples),
        ratio=_mean([record.nbytes / record.full_nbytes for record in records]),
        step=1000 * seconds / tokens if tokens else None,
        prefill=_mean([record.prefill_seconds for record in records if record.prefill_seconds is not None]),
    )  # fmt: skip


def _front(cells: Sequence[Cell], costs: Sequence[float | None]) -> list[bool]:
    """Which cells are on the Pareto front, among those that miss nothing."""
    found = [False] * len(cells)
    points = [
        (i, cost, cell.score if cell.higher else -cell.score)
        for i, (cell, cost) in enumerate(zip(cells, costs, strict=True))
        if cost is not None and cell.score is not None and not cell.partial
    ]
    for (i, *_), best in zip(points, pareto_front([p[1] for p in points], [p[2] for p in points]), strict=True):
        found[i] = bool(best)
    return found


def _with_fronts(cells: Sequence[Cell]) -> list[Cell]:
    memory, time = _front(cells, [cell.ratio for cell in cells]), _front(cells, [cell.step for cell in cells])
    return [
        replace(cell, front_memory=small, front_time=fast)
        for cell, small, fast in zip(cells, memory, time, strict=True)
    ]


def tabulate(strata: Strata) -> list[Cell]:
    """All cells, contenders in the order shown."""
    return [
        cell
        for choice in choices(strata)
        for cell in _with_fronts([_cell(choice, c) for c in strata.contenders if c in choice.contenders])
    ]
