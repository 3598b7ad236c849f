"""Budgets of layers by how much they suffer when a prompt is read in blocks."""

import numpy as np


def by_sensitivity(sensitivity: tuple[float, ...], power: float, floor: float = 0.0) -> tuple[float, ...]:
    """Each layer's share, with mean 1, in proportion to its sensitivity to the `power`; none under `floor`.

    What raises a layer to the floor, the others pay for. All zero counts as equal.
    """
    weights = np.maximum(np.asarray(sensitivity, dtype=np.float64), 0.0) ** power
    if weights.sum() <= 0.0:
        return (1.0,) * len(weights)
    low = np.zeros(len(weights), dtype=bool)
    while True:
        rest = len(weights) - floor * low.sum()
        shares = np.where(low, floor, weights * rest / weights[~low].sum())
        fell = ~low & (shares < floor - 1e-9)
        if not fell.any():
            return tuple(float(share) for share in shares)
        low |= fell
