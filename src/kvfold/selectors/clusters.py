"""Vectors as the nearest of a few: k-means, and whose cell a vector is in."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 1 << 22
"""Distances that are there at a time."""
ROUNDING = 1e-6
"""Of a vector's squared length: no two that are different are nearer."""


def nearest(
    points: Float[Tensor, "*S N E"], centres: Float[Tensor, "*S K E"]
) -> tuple[Int[Tensor, "*S N"], Float[Tensor, "*S N"]]:
    """Which centre each point is nearest to, the first of equal ones, and the square of how far it is, float32."""
    n, k = points.shape[-2], centres.shape[-2]
    half = (centres * centres).sum(-1)[..., None, :] / 2
    step, found = max(1, BLOCK // max(1, k * points[..., 0, 0].numel())), []
    for start in range(0, max(1, n), step):
        some = points[..., start : start + step, :]
        found.append((some @ centres.mT - half).max(-1))
    near, which = (torch.cat(each, -1) for each in zip(*((x.values, x.indices) for x in found), strict=True))
    return which, ((points * points).sum(-1) - 2 * near).clamp(min=0)


def kmeans(points: Float[Tensor, "S N E"], first: Int[Tensor, "S K"], iterations: int) -> Float[Tensor, "S K E"]:
    """Centres of S clusterings, from points `first` on (Lloyd), until nothing changes or `iterations` are over.

    A centre that no point is nearest to goes to the point that is furthest from its own, so that none is wasted while
    vectors differ. With as many centres as different points each point is one, after enough iterations.
    """
    s, n, e = points.shape
    k, ones, before = first.shape[1], points.new_ones(s, n), None
    centres = points.gather(1, first[..., None].expand(s, k, e))
    length = (points * points).sum(-1)
    for _ in range(iterations):
        which, apart = nearest(points, centres)
        sizes = points.new_zeros(s, k).scatter_add_(1, which, ones)
        sums = points.new_zeros(s, k, e).scatter_add_(1, which[..., None].expand(s, n, e), points)
        centres = torch.where(sizes[..., None] > 0, sums / sizes.clamp(min=1)[..., None], centres)
        moved = _fill(points, centres, sizes, apart.masked_fill(apart <= ROUNDING * length, 0.0))
        if not moved and before is not None and torch.equal(which, before):
            break
        before = which
    return centres


def _fill(points: Tensor, centres: Tensor, sizes: Tensor, apart: Tensor) -> bool:
    """Put the centres of nothing on the points that are furthest from theirs; whether any was moved."""
    moved = False
    for some, held, size, far in zip(points, centres, sizes, apart, strict=True):
        empty = (size == 0).nonzero()[:, 0]
        if len(empty):
            furthest = far.topk(min(len(empty), len(far)))
            here = furthest.indices[furthest.values > 0]
            held[empty[: len(here)]] = some[here]
            moved = moved or len(here) > 0
    return moved


def drawn(count: int, number: int, *key: int) -> Int[Tensor, " K"]:
    """`number` different ones of `count`, at random: a function of the key alone, whatever was drawn before."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    return torch.from_numpy(random.choice(count, number, replace=False))


def spread(points: Float[Tensor, "N E"], number: int, *key: int) -> Int[Tensor, " K"]:
    """`number` points that are far from each other: each drawn by the square of how far it is from those before it.

    (k-means++.) A function of points and key alone; where fewer points differ, some are drawn twice.
    """
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    length = (points * points).sum(-1)
    chosen = [int(random.integers(len(points)))]
    apart = torch.full_like(length, torch.inf)
    for where in random.random(number - 1).tolist():
        last = points[chosen[-1]]
        new = (length + length[chosen[-1]] - 2 * (points @ last)).clamp(min=0)
        apart = torch.minimum(apart, new.masked_fill(new <= ROUNDING * length, 0.0))
        total = apart.double().cumsum(0)
        found = torch.searchsorted(total, total[-1] * where, right=True)
        chosen.append(min(int(found), len(points) - 1))
    return torch.tensor(chosen, dtype=torch.int64)
