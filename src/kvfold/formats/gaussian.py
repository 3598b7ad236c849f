"""What a vector quantiser knows beforehand: a random rotation, and the levels that suit a normal distribution."""

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

LAYER = 1337
"""How far the seeds of two layers that follow each other are apart."""


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal matrix of a layer (Haar): QR of a Gaussian one, with the signs of R's diagonal.

    The same wherever it is made: drawn by NumPy's `RandomState` (MT19937, whose stream is fixed for good) from
    `seed + 1337 * layer`, worked out on the CPU in float64. All caches of a process share it; it is no cache's memory.
    """

    seed: int
    layer: int
    size: int

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "D D"]:
        """The matrix; x becomes `x @ matrix.T`."""
        return _matrix(self, device, dtype)


@cache
def _matrix(rotation: Rotation, device: torch.device, dtype: torch.dtype) -> Tensor:
    size = rotation.size
    random = np.random.RandomState((rotation.seed + LAYER * rotation.layer) % 2**32)
    q, r = np.linalg.qr(random.standard_normal((size, size)))
    return torch.from_numpy(q * np.sign(np.diag(r))).to(device=device, dtype=dtype)


@cache
def lloyd_max(bits: int) -> tuple[float, ...]:
    """The 2^bits levels, in order, that the least squared error of a standard normal number takes (Lloyd, Max).

    Each is the mean of what is nearer to it than to any other.
    """
    count = 1 << bits
    levels = [_quantile((i + 0.5) / count) for i in range(count)]
    moved = 1.0
    while moved > 1e-10:
        cuts = [-math.inf, *middles(tuple(levels)), math.inf]
        means = [(_density(low) - _density(high)) / (_below(high) - _below(low)) for low, high in pairwise(cuts)]
        moved, levels = max(abs(x - y) for x, y in zip(means, levels, strict=True)), means
    return tuple((x - y) / 2 for x, y in zip(levels, reversed(levels), strict=True))  # symmetric to the last bit


def middles(levels: tuple[float, ...]) -> list[float]:
    """Where the nearest level changes."""
    return [(low + high) / 2 for low, high in pairwise(levels)]


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _below(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def _quantile(share: float) -> float:
    """Where the standard normal distribution has this share below, by bisection: good enough to start from."""
    low, high = -9.0, 9.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle) < share else (low, middle)
    return (low + high) / 2
