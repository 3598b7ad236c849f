"""Bounds of small units, of which a larger one is worth the best: what is read together stays large (LServe)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Spec, register
from kvfold.options import check_int
from kvfold.selectors.bounds import BoundsOf
from kvfold.selectors.held import HELD, OfParts, check_held, narrow, nothing


@dataclass(frozen=True)
class Hierarchical:
    """Of each `logical` tokens of a unit what `Bounds` remembers, and the most that one of these promises for the unit.

    Two levels of LServe (arXiv:2502.14866): a unit is a page of the size that kernels like, and its bound is no looser
    than that of its logical pages. 1 / `logical` of the cache of a model of 16 bits. Raises ValueError where `logical`
    does not divide `unit`.
    """

    unit: int = 64
    logical: int = 16
    enough = 0

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)
        check_int("logical", self.logical, 1)
        if self.unit % self.logical:
            raise ValueError(f"logical={self.logical} must divide unit={self.unit}")

    @property
    def parts(self) -> int:
        """Logical pages of a unit."""
        return self.unit // self.logical

    def open(self, spec: Spec) -> "HierarchicalOf":
        return HierarchicalOf(self, spec, nothing(spec, 2 * spec.key_size, narrow(spec.dtype)))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        whole = -(-counts // self.unit) * self.unit
        check_held(spec, tensors, whole, self.logical, 2 * spec.key_size, narrow(spec.dtype))

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "HierarchicalOf":
        return HierarchicalOf(self, spec, tensors[HELD].to(spec.device).clone())


class HierarchicalOf(OfParts, BoundsOf):
    """`held` (B, H, N, 2 D) as in `BoundsOf`, N logical pages, of which the recipe's `parts` are a unit."""

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not scaled, which changes no order."""
        parts = self.recipe.parts
        scores = super().scores(asked, units * parts)
        empty = self.held[:, :, : scores.shape[-1], 0] == -torch.inf  # of the unit that is still open
        scores = scores.masked_fill(empty[:, :, None], -torch.inf)
        return scores.view(*scores.shape[:3], -1, parts).amax(-1)


register("hierarchical", Hierarchical)
