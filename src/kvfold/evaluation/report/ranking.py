"""Which method is best at a budget, and which others can't be told from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvfold.evaluation.report.cells import Cell, Choice, choices
from kvfold.evaluation.report.strata import ReportContender, Strata, budget_order
from kvfold.evaluation.statistics import holm, permutation_test

TEST = "paired sign-flip permutation test over examples, two-sided, Holm-corrected over the methods of a budget"


@dataclass(frozen=True)
class Standing:
    """A method's place at a budget. `p`: Holm-corrected, against the best; None for the best, and where no example
    is shared. `loss`: how much worse than the full cache, in the score's unit; None without a full cache."""

    cell: Cell
    rank: int
    p: float | None
    loss: float | None


def paired_differences(choice: Choice, one: ReportContender, other: ReportContender) -> list[float]:
    """Differences over the examples that both have, weighed so that their sum is the difference of the averages.

    Within a length an example weighs as much as its metric has it (questions, or tokens), lengths weigh alike within a
    task, and tasks among all. Differences of perplexities are those of their logarithms.
    """
    groups: list[list[list[float]]] = []
    for group in choice.parts:
        pairs = []
        for _, _, stratum in group:
            if one in stratum and other in stratum:
                mine, theirs = stratum[one].totals, stratum[other].totals
                both = [(*mine[name], theirs[name][0]) for name in mine if name in theirs]
                weight = sum(share for _, share, _ in both)
                pairs.append([(ours - others) / weight for ours, _, others in both])
        if shared := [pair for pair in pairs if pair]:
            groups.append(shared)
    return [difference / (len(groups) * len(group)) for group in groups for pair in group for difference in pair]


def _ranked(choice: Choice, cells: Sequence[Cell], full: Cell | None) -> Iterator[Standing]:
    sign = -1 if choice.higher else 1
    order = sorted(cells, key=lambda cell: (cell.score is None, sign * (cell.score or 0.0)))
    best = order[0]
    tested: list[int] = []
    raw: list[float] = []
    for place, cell in enumerate(order[1:], start=1):
        if differences := paired_differences(choice, best.contender, cell.contender):
            tested.append(place)
            raw.append(permutation_test(differences))
    corrected = dict(zip(tested, map(float, holm(raw)), strict=True))
    for place, cell in enumerate(order):
        loss = None
        if full is not None and full.score is not None and cell.score is not None:
            loss = (full.score - cell.score) * (1 if choice.higher else -1)
        yield Standing(cell, place + 1, corrected.get(place), loss)


def standings(strata: Strata, cells: Sequence[Cell]) -> list[Standing]:
    """The ranking of every choice of task and length at every budget; the full cache stands outside."""
    by_choice: dict[tuple[object, str, str], list[Cell]] = {}
    for cell in cells:
        by_choice.setdefault((cell.setup, cell.task, cell.length), []).append(cell)
    found: list[Standing] = []
    for choice in choices(strata):
        here = by_choice[choice.setup, choice.task, choice.length]
        full = next((cell for cell in here if cell.contender.reference), None)
        rivals = [cell for cell in here if not cell.contender.reference]
        for budget in sorted({cell.contender.budget for cell in rivals}, key=budget_order):
            found += _ranked(choice, [cell for cell in rivals if cell.contender.budget == budget], full)
    return found
