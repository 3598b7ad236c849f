"""Budgets that differ from head to head by numbers that were measured beforehand."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from kvfold.budgets.allocate import Budget, round_shares

Shares = Callable[[float], tuple[tuple[float, ...], ...]]
"""From a mean budget of so many tokens to what each (layer, head) should get of it."""


@lru_cache(maxsize=4096, typed=True)
def allocate_heads(budget: Budget, length: int, cap: int, shares: Shares) -> tuple[tuple[int, ...], ...]:
    """Tokens that each (layer, head) may keep: integers whose sum never exceeds the budget, none above `cap`.

    `shares` must be hashable: a bound method of a frozen dataclass, or a partial of a function kept for good. What
    the cap cuts off one head goes to the others.
    """
    each = budget * length if isinstance(budget, float) else float(budget)
    return tuple(tuple(int(n) for n in row) for row in round_shares(np.asarray(shares(float(min(each, cap)))), cap))
