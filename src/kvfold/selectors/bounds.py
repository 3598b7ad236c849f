"""The least and the largest of each channel of a unit's keys: no query finds more there than they allow (Quest)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats import Spec, register
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE

HELD = "bounds"


@dataclass(frozen=True)
class Bounds:
    """Of each unit of `unit` tokens the largest and the least number of each channel of its keys, as they are stored.

    A query q is promised sum_d max(q_d low_d, q_d high_d), which no product with a key of the unit exceeds: page
    selection of Quest (arXiv:2406.10774). Keys are those that attend, after RoPE. Two numbers of a channel for `unit`
    keys and values: 1 / unit of the cache in its model's dtype.
    """

    unit: int = PAGE_SIZE

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "BoundsOf":
        none = torch.empty(spec.rows, spec.heads, 0, 2 * spec.key_size, dtype=spec.dtype, device=spec.device)
        return BoundsOf(self.unit, none)

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        units = -(-int(counts.max(initial=0)) // self.unit)
        want = (spec.rows, spec.heads, units, 2 * spec.key_size), spec.dtype
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != {HELD: want}:
            raise ValueError(f"index={found} must be { ({HELD: want}) } (shape, dtype)")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "BoundsOf":
        return BoundsOf(self.unit, tensors[HELD].to(spec.device).clone())


class BoundsOf:
    """`held` (B, H, N, 2 D): of each unit the largest of k, then the largest of -k; -inf where no token has come."""

    def __init__(self, unit: int, held: Float[Tensor, "B H N E"]):
        self.unit, self.held = unit, held

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        rows, heads, known, width = self.held.shape
        return rows * heads * max(known, units) * width * self.held.itemsize

    def row_nbytes(self) -> np.ndarray:
        rows = len(self.held)
        return np.full(rows, self.held.nbytes // max(1, rows))

    def extend(self, keys: Float[Tensor, "B H N D"], valid: Bool[Tensor, "B H N"], start: np.ndarray) -> None:
        """See `Remembered.extend`."""
        new = valid.cpu().numpy().sum(-1)
        if not new.any():
            return
        self._reach(-(-int((start + new).max()) // self.unit))
        ops.raise_bounds(self.held, keys.to(self.held.dtype), valid, start, self.unit)

    def forget(self, units: np.ndarray) -> None:
        """See `Remembered.forget`."""
        most = int(units.max(initial=0))
        if most < self.held.shape[2]:
            self.held = self.held[:, :, :most].clone()
        gone = torch.arange(self.held.shape[2]) >= torch.from_numpy(np.ascontiguousarray(units))[..., None]
        self.held.masked_fill_(gone.to(self.held.device)[..., None], -torch.inf)

    def scores(self, q: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not scaled, which changes no order."""
        return ops.bound_scores(q, self.held, units)

    def select(self, rows: np.ndarray) -> "BoundsOf":
        """See `Remembered.select`."""
        return BoundsOf(self.unit, self.held[torch.from_numpy(np.asarray(rows)).to(self.held.device)])

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        most = max(self.held.shape[2], other.held.shape[2])
        wide = [F.pad(x, (0, 0, 0, most - x.shape[2]), value=-torch.inf) for x in (self.held, other.held)]
        self.held = torch.cat(wide)

    def clear(self) -> None:
        self.held = self.held[:, :, :0].clone()

    def state(self) -> dict[str, Tensor]:
        return {HELD: self.held}

    def _reach(self, units: int) -> None:
        """Room for so many units in each row, and for 1/16 more once there are some: a step adds one now and then."""
        known = self.held.shape[2]
        if units > known:
            more = units - known + (units // 16 if known else 0)
            self.held = F.pad(self.held, (0, 0, 0, more), value=-torch.inf)


register("bounds", Bounds)
