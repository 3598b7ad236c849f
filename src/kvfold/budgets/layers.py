"""Budgets of layers that depend on the prompt: in proportion to weights, or along a line."""

import numpy as np
from torch import Tensor

from kvfold.budgets.allocate import Budget


def tokens_each(budget: Budget, prompt: Tensor, seen: Tensor) -> list[float]:
    """A budget in tokens per KV head, for each row that has read `seen` tokens, `prompt` of them as a prompt."""
    if isinstance(budget, float):
        return [budget * length for length in prompt.tolist()]
    return [float(min(budget, length)) for length in seen.tolist()]


def share_out(weights: np.ndarray, total: float, caps: np.ndarray) -> np.ndarray:
    """Real shares of `total` in proportion to `weights`, none above its cap; what a cap cuts off goes to the others.

    Weights that are all zero count as equal. With more to share no share falls, and with more sharers none grows.
    """
    shares, room = np.zeros(len(caps)), caps > 0
    while room.any() and (left := total - shares.sum()) > 1e-9:
        scale = np.where(room, weights, 0.0)
        scale = scale if scale.sum() > 0 else room.astype(np.float64)
        shares = np.minimum(shares + left * scale / scale.sum(), caps)
        room &= shares < caps
    return shares


def line(first: float, last: float, count: int) -> np.ndarray:
    """`count` numbers from `first` to `last` in equal steps; of a lone one, the mean of both."""
    return np.linspace(first, last, count) if count > 1 else np.array([(first + last) / 2])
