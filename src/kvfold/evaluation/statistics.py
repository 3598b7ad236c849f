"""How sure a score is: bootstrap intervals, a paired permutation test, Holm's correction, the Pareto front."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

EXACT = 14
"""Up to so many differences that are not zero, all signs are tried (2^14) instead of random ones."""
BLOCK = 1 << 21
"""Random numbers that are held at once."""


def _finite(name: str, given: ArrayLike) -> Floats:
    array = np.asarray(given, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name}={given!r} must be a flat list of at least one finite number")
    return array


def _blocks(resamples: int, size: int) -> Iterator[int]:
    """Rows to draw at a time, `resamples` in all."""
    if resamples < 1:
        raise ValueError(f"resamples={resamples} must be at least 1")
    step = max(1, BLOCK // max(size, 1))
    yield from (min(step, resamples - start) for start in range(0, resamples, step))


def resampled_indices(size: int, resamples: int = 1000, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Blocks of rows, each row `size` indices drawn with replacement; the same for the same seed and size."""
    rng = np.random.default_rng([seed, size])
    for rows in _blocks(resamples, size):
        yield rng.integers(0, size, (rows, size))


def bootstrap_means(sums: ArrayLike, sizes: ArrayLike | None = None, *, resamples: int = 1000, seed: int = 0) -> Floats:
    """Means of `resamples` draws with replacement.

    A unit (an example) may hold several values (its questions), which are drawn together: `sums` are then the units'
    sums and `sizes` how many values each has. Raises ValueError for empty or non-finite values.
    """
    totals = _finite("sums", sums)
    counts = np.ones_like(totals) if sizes is None else _finite("sizes", sizes)
    if counts.shape != totals.shape or (counts <= 0).any():
        raise ValueError(f"sizes={sizes!r} must hold a positive number for each of the {totals.size} sums")
    return np.concatenate([
        totals[drawn].sum(1) / counts[drawn].sum(1) for drawn in resampled_indices(totals.size, resamples, seed)
    ])  # fmt: skip


def percentile_interval(draws: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of bootstrap draws. Raises ValueError for a level outside (0, 1)."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level!r} must be between 0 and 1")
    low, high = np.quantile(_finite("draws", draws), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    values: ArrayLike, level: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean."""
    return percentile_interval(bootstrap_means(values, resamples=resamples, seed=seed), level)


def permutation_test(differences: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of paired differences: how often random signs move their sum as far from zero as it is.

    Exact for up to `EXACT` differences that are not zero (those that are change nothing); beyond, (hits + 1) /
    (resamples + 1), so that p is never 0. Differences may carry weights, since only their sum is looked at.
    """
    given = _finite("differences", differences)
    moving = given[given != 0.0]
    observed = abs(moving.sum()) - 1e-12 * np.abs(moving).sum()  # equal sums in another order are equal
    if moving.size <= EXACT:
        patterns = np.arange(1 << moving.size)[:, None] >> np.arange(moving.size) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ moving) >= observed))
    rng, hits = np.random.default_rng([seed, moving.size]), 0
    for rows in _blocks(resamples, moving.size):
        signs = 1 - 2 * rng.integers(0, 2, (rows, moving.size), dtype=np.int8)
        hits += int(np.count_nonzero(np.abs(signs.astype(np.float64) @ moving) >= observed))
    return (hits + 1) / (resamples + 1)


def holm(p_values: ArrayLike) -> Floats:
    """Holm's step-down adjustment of p values tested together, in the order given."""
    array = np.asarray(p_values, dtype=np.float64)
    if array.ndim != 1 or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"p_values={p_values!r} must be a flat list of numbers in [0, 1]")
    order = np.argsort(array, kind="stable")
    stepped = np.maximum.accumulate(array[order] * np.arange(array.size, 0, -1))
    adjusted = np.empty_like(array)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def pareto_front(costs: ArrayLike, gains: ArrayLike) -> NDArray[np.bool_]:
    """Which points no other beats: none costs at most as much and gains at least as much, one of them strictly."""
    cost, gain = np.asarray(costs, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if cost.ndim != 1 or cost.shape != gain.shape or np.isnan(cost).any() or np.isnan(gain).any():
        raise ValueError(f"costs={costs!r} and gains={gains!r} must be two flat lists of equal length without NaN")
    no_worse = (cost[:, None] <= cost) & (gain[:, None] >= gain)  # [i, j]: i is as good as j in both
    better = (cost[:, None] < cost) | (gain[:, None] > gain)
    return np.logical_not((no_worse & better).any(axis=0))
