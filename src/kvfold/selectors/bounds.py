"""The least and the largest of each channel of a unit's keys: no query finds more there than they allow (Quest)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats import Chunk, Spec, register
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE
from kvfold.selectors.held import HELD, HeldUnits, check_held, narrow, nothing


@dataclass(frozen=True)
class Bounds:
    """Of each unit of `unit` tokens the largest and the least number of each channel of its keys, as they are stored.

    A query q is promised sum_d max(q_d low_d, q_d high_d), which no product with a key of the unit exceeds: page
    selection of Quest (arXiv:2406.10774). Keys are those that attend, after RoPE. Two numbers of a channel for `unit`
    keys and values, held in 16 bits: 1 / unit of the cache of a model of 16 bits, half of that in a wider one, where
    they are bfloat16 that was rounded away from what they bound.
    """

    unit: int = PAGE_SIZE
    enough = 0

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "BoundsOf":
        return BoundsOf(self, spec, nothing(spec, 2 * spec.key_size, narrow(spec.dtype)))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, tensors, counts, self.unit, 2 * spec.key_size, narrow(spec.dtype))

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "BoundsOf":
        return BoundsOf(self, spec, tensors[HELD].to(spec.device).clone())


class BoundsOf(HeldUnits):
    """`held` (B, H, N, 2 D): of each unit the largest of k, then the largest of -k; -inf where no token has come."""

    fill = -torch.inf

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        new = tokens.valid.cpu().numpy().sum(-1)
        if not new.any():
            return
        self.reach(-(-int((start + new).max()) // self.unit))
        ops.raise_bounds(self.held, tokens.keys, tokens.valid, start, self.unit)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not scaled, which changes no order."""
        return ops.bound_scores(asked, self.held, units)


register("bounds", Bounds)
