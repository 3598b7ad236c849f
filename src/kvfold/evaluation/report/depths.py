"""The heat map: scores by where in the context the answer stands, and by length."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from kvfold.evaluation.report.cells import ALL_LENGTHS, Choice, choices
from kvfold.evaluation.report.reading import Results
from kvfold.evaluation.report.strata import ReportContender, Setup, Strata, length_name

Depths = Mapping[tuple[str, str, str, str], float]
"""By model, task, length and example."""
ROWS = 15


@dataclass(frozen=True)
class Spot:
    """The mean score of the examples whose answer stands at a depth, 0 to 1; `n` of them.

    An example has one depth, the one that its task names; all its questions count there.
    """

    setup: Setup
    task: str
    length: str
    depth: float
    contender: ReportContender
    score: float
    n: int


def depths_of(results: Results) -> Depths:
    """The depths that examples name; more than `ROWS` different ones are rounded to tenths."""
    found = {
        (text.model, text.task, length_name(text.length), text.example): text.depth
        for text in results.texts.values()
        if text.depth is not None
    }
    digits = 1 if len(set(found.values())) > ROWS else 3
    return {key: round(depth, digits) for key, depth in found.items()}


def _spots(strata: Strata, choice: Choice, contender: ReportContender, depths: Depths) -> Iterator[Spot]:
    """Tasks weigh alike, however many examples they have at a depth."""
    found: dict[float, list[list[float]]] = {}
    for group in choice.parts:
        by_depth: dict[float, list[float]] = {}
        for label, length, stratum in group:
            if contender not in stratum:
                continue
            task = strata.measures[label].task
            for example, value in stratum[contender].values.items():
                if (depth := depths.get((choice.setup.model, task, length, example))) is not None:
                    by_depth.setdefault(depth, []).append(value)
        for depth, values in by_depth.items():
            found.setdefault(depth, []).append(values)
    for depth, tasks in sorted(found.items()):
        score, n = fmean(map(fmean, tasks)), sum(map(len, tasks))
        yield Spot(choice.setup, choice.task, choice.length, depth, contender, score, n)


def spots(strata: Strata, depths: Depths) -> list[Spot]:
    """All cells of the heat map: for every task, and the average over tasks, at every length."""
    return [
        spot
        for choice in choices(strata)
        if choice.unit == "score" and choice.length != ALL_LENGTHS
        for contender in strata.contenders
        for spot in _spots(strata, choice, contender, depths)
    ]
