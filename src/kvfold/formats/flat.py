"""Tokens of many rows without gaps, one row behind the other: how ragged rows move without a loop."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """`planes` (N, ...) hold `counts[r]` tokens of each row, row by row."""

    counts: np.ndarray
    planes: Mapping[str, Tensor]

    def then(self, other: "Flat") -> "Flat":
        """Each row's tokens of the other behind its own; a column that one of them lacks is zero there."""
        if not other.counts.any() or not self.counts.any():
            return self if self.counts.any() else other
        rows = np.concatenate([np.repeat(np.arange(len(x.counts)), x.counts) for x in (self, other)])
        order = torch.from_numpy(np.argsort(rows, kind="stable"))
        both = {**other.planes, **self.planes}
        planes = {name: torch.cat([x.plane(name, like) for x in (self, other)]) for name, like in both.items()}
        return Flat(self.counts + other.counts, {name: x[order.to(x.device)] for name, x in planes.items()})

    def plane(self, name: str, like: Tensor) -> Tensor:
        """One of the planes; zeros like another's where it is lacking."""
        return self.planes[name] if name in self.planes else like.new_zeros(int(self.counts.sum()), *like.shape[1:])

    def split(self, counts: np.ndarray) -> tuple["Flat", "Flat"]:
        """The first `counts[r]` tokens of each row, and what is behind them."""
        place = np.arange(int(self.counts.sum())) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        first = torch.from_numpy(place < np.repeat(counts, self.counts))
        return self._only(counts, first), self._only(self.counts - counts, ~first)

    def _only(self, counts: np.ndarray, which: Tensor) -> "Flat":
        if bool(which.all()):
            return Flat(counts, self.planes)
        return Flat(counts, {name: x[which.to(x.device)] for name, x in self.planes.items()})
