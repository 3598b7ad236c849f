"""Which level of a part to load, by the time that is left (CacheGen, arXiv:2310.07240, section 5)."""

from collections.abc import Mapping, Sequence

TEXT = 0
"""The level that is no stored one: the model reads the part's text."""


def seconds(
    sizes: Mapping[int, int], tokens: int, bandwidth: float | None, prefill_rate: float | None
) -> dict[int, float]:
    """What each level of a part takes: `sizes` bytes by level, `tokens` to read; without a rate it is not a choice.

    `bandwidth` in bytes a second, `prefill_rate` in tokens a second; None: not known.
    """
    costs = {} if bandwidth is None else {level: size / bandwidth for level, size in sizes.items()}
    return costs if prefill_rate is None else {**costs, TEXT: tokens / prefill_rate}


def choose(costs: Sequence[Mapping[int, float]], remaining: float, stored: Sequence[int] = ()) -> int:
    """The level of the first of the parts that are to come; `costs` are the seconds of each at each level.

    The best that all of them have time for; else the best for which the others have time at their fastest; else the
    fastest. While rates hold, the budget is met whenever any choice of levels meets it. Text is better than every
    level: it gives the model's own keys and values. `stored`: levels of the first part while nobody knows how fast
    they come: the medium one then, as in the paper, unless there is time for the text of all.
    """
    fastest = [min(each.values(), default=0.0) for each in costs]
    by_quality = sorted(costs[0], key=lambda level: (level == TEXT, level), reverse=True)
    for level in by_quality:
        if sum(each.get(level, float("inf")) for each in costs) <= remaining:
            return level
    if stored:
        return sorted(stored)[len(stored) // 2]
    for level in by_quality:
        if costs[0][level] + sum(fastest[1:]) <= remaining:
            return level
    return min(by_quality, key=lambda level: costs[0][level], default=TEXT)
