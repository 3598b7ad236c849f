"""The mean of a unit's keys, and how well it stands for them (ShadowKV's landmarks and outliers)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.formats.chunks import chunk_means
from kvfold.ops.units.naive import behind
from kvfold.options import check_int
from kvfold.selectors.whole import WholeUnits, check_whole


@dataclass(frozen=True)
class Means:
    """Of each unit of `unit` tokens the mean of its keys, after RoPE, and the least cosine of one of them with it.

    Landmarks of ShadowKV (arXiv:2410.21465): a query is asked by its product with the mean. A unit that still grows has
    none, and must be read anyhow. D + 1 numbers for `unit` keys and values in the model's dtype: 1 / (2 unit) of the
    cache.
    """

    unit: int = 8
    enough = 0

    unlike: ClassVar[bool] = True
    """Whether it knows which units it stands for badly (`kvfold.selectors.odd.Unlike`)."""

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "MeansOf":
        return MeansOf.empty(self, spec, spec.key_size + 1, spec.key_size, spec.dtype)

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_whole(spec, tensors, counts, self.unit, spec.key_size + 1, spec.key_size, spec.dtype)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "MeansOf":
        return MeansOf.restored(self, spec, tensors)


class MeansOf(WholeUnits):
    """`held` (B, H, N, D + 1): the mean, then the cosine."""

    def told(self, tokens: Chunk) -> Float[Tensor, "B H T D"]:
        """See `WholeUnits.told`: keys as they attend."""
        return tokens.keys

    def made(self, told: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H N E"]:
        """See `WholeUnits.made`."""
        means, alike = chunk_means(told, self.unit)
        return torch.cat([means, alike[..., None]], -1)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not divided by sqrt(D). What it says of a unit that is not whole has no meaning."""
        return behind(asked.float() @ self.held[:, :, : int(units.max(initial=0)), :-1].float().mT, units)

    def unlike(self, units: int) -> Float[Tensor, "B H N"]:
        """See `Unlike.unlike`: minus the least cosine that a key of a unit has with their mean."""
        return -self.held[:, :, :units, -1].float()


register("means", Means)
