"""Budgets: a fraction of the prompt or a number of tokens, split over layers and heads by one rounding rule."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Budget = float | int
"""A fraction of the prompt (float in (0, 1]) or tokens per KV head (int >= 1). Sinks and recent window count."""


def check_budget(budget: object, name: str = "budget") -> None:
    """Raise ValueError unless `budget` is a float in (0, 1] or an int in [1, 2^31)."""
    whole = isinstance(budget, int) and not isinstance(budget, bool) and 1 <= budget < 2**31
    part = isinstance(budget, float) and 0.0 < budget <= 1.0
    if not (whole or part):
        raise ValueError(
            f"{name}={budget!r} must be a fraction of the prompt (float in (0, 1]) or tokens per KV head (int >= 1 and "
            "< 2^31)"
        )


def is_all(budget: Budget) -> bool:
    """Whether a budget is no limit: all of the prompt, which 1 (a single token) is not."""
    return isinstance(budget, float) and budget == 1.0


def round_shares(shares: np.ndarray, cap: int) -> np.ndarray:
    """Integers near `shares`, none above `cap`, with their sum rounded down.

    Floor, then the remainder goes out by largest fraction, ties to the lower index. What the cap cuts off one
    share is handed to the others in proportion, as long as they have room.
    """
    shares = np.asarray(shares, dtype=np.float64)
    total = min(int(np.floor(shares.sum() + 1e-9)), cap * shares.size)
    while (over := shares > cap).any() and not over.all():
        excess = (shares[over] - cap).sum()
        shares = np.where(over, cap, shares)
        room = shares < cap
        weight = np.where(room, shares, 0.0)
        if not room.any() or excess < 1e-9:
            break
        weight = weight if weight.sum() > 0 else room.astype(np.float64)
        shares = shares + excess * weight / weight.sum()
    shares = np.minimum(shares, cap)
    whole = np.floor(shares + 1e-9).astype(np.int64)
    order = np.argsort(-(shares - whole), axis=None, kind="stable")
    order = order[whole.reshape(-1)[order] < cap]
    whole.reshape(-1)[order[: max(0, total - int(whole.sum()))]] += 1
    return whole


@lru_cache(maxsize=4096, typed=True)  # 1 token is not 1.0 of the prompt
def allocate(
    budget: Budget, length: int, cap: int, layers: int, heads: int, weights: tuple[float, ...] | None = None
) -> tuple[tuple[int, ...], ...]:
    """Tokens that each (layer, head) may keep: (L, H) integers whose sum never exceeds the budget.

    A fraction is one of `length` tokens; no head gets more than `cap`. `weights` (one for each layer, scaled to
    mean 1) share the budget unevenly over layers.
    """
    each = budget * length if isinstance(budget, float) else float(budget)
    scale = np.ones(layers) if weights is None else np.asarray(weights) * layers / sum(weights)
    shares = np.repeat((each * scale)[:, None], heads, axis=1)
    rounded = round_shares(shares, cap)
    return tuple(tuple(int(n) for n in row) for row in rounded)


def exempt_layers(layers: Sequence[int], total: int, budget: float, floor: float = 0.75) -> tuple[float, ...]:
    """Layer weights under which `layers` are kept whole, as long as the others keep `floor` of an even share.

    The budget is the budget: what exempt layers keep, the others pay for. Where that would cost them more than
    the floor allows, the exempt layers get what is left at the floor.
    """
    chosen = {layer % total for layer in layers if -total <= layer < total}
    if not chosen or len(chosen) == total or budget >= 1.0:
        return (1.0,) * total
    others = total - len(chosen)
    whole = min(1.0 / budget, (total - floor * others) / len(chosen))
    rest = (total - whole * len(chosen)) / others
    return tuple(whole if layer in chosen else rest for layer in range(total))
