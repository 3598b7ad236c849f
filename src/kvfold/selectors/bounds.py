"""The least and the largest of each channel of a unit's keys: no query finds more there than they allow (Quest)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE
from kvfold.selectors.held import HELD, HeldUnits, behind, check_held, nothing


@dataclass(frozen=True)
class Bounds:
    """Of each unit of `unit` tokens the largest and the least number of each channel of its keys, as they are stored.

    A query q is promised sum_d max(q_d low_d, q_d high_d), which no product with a key of the unit exceeds: page
    selection of Quest (arXiv:2406.10774). Keys are those that attend, after RoPE. Two numbers of a channel for `unit`
    keys and values: 1 / unit of the cache in its model's dtype.
    """

    unit: int = PAGE_SIZE
    enough = 0

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "BoundsOf":
        return BoundsOf(self, spec, nothing(spec, 2 * spec.key_size))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, tensors, counts, self.unit, 2 * spec.key_size)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "BoundsOf":
        return BoundsOf(self, spec, tensors[HELD].to(spec.device).clone())


class BoundsOf(HeldUnits):
    """`held` (B, H, N, 2 D): of each unit the largest of k, then the largest of -k; -inf where no token has come."""

    fill = -torch.inf

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        keys, valid, unit = tokens.keys, tokens.valid, self.unit
        if not bool(valid.any()):
            return
        new = keys.to(self.held.dtype)
        first = int(start.flat[0]) if start.size else 0
        if bool((start == first).all()) and bool(valid.all()):
            before, after = first % unit, -(first + keys.shape[2]) % unit
            self.reach(-(-(first + keys.shape[2]) // unit))
            units = slice(first // unit, -(-(first + keys.shape[2]) // unit))
            for some, sign in zip(self.held[:, :, units].chunk(2, -1), (1, -1), strict=True):
                padded = F.pad(new * sign if sign < 0 else new, (0, 0, before, after), value=-torch.inf)
                torch.maximum(some, padded.view(*padded.shape[:2], -1, unit, padded.shape[3]).amax(3), out=some)
            return
        begin = torch.from_numpy(np.ascontiguousarray(start)).to(keys.device)
        number = (begin[..., None] + valid.cumsum(-1) - 1) // unit
        self.reach(int(number.max()) + 1)
        place = number.clamp(min=0)[..., None].expand(*number.shape, self.held.shape[-1])
        both = torch.cat([new, -new], -1).masked_fill(~valid[..., None], -torch.inf)
        self.held.scatter_reduce_(2, place, both, "amax")

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not scaled, which changes no order."""
        both = torch.cat([asked.relu(), (-asked).relu()], -1).float()
        return behind(both @ self.held[:, :, : int(units.max(initial=0))].float().mT, units)


register("bounds", Bounds)
