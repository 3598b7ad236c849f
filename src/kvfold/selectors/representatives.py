"""The few tokens of a unit that were looked at most, as one vector for each query head (InfLLM)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.ops.units.naive import behind
from kvfold.options import check_int
from kvfold.selectors.held import from_behind
from kvfold.selectors.whole import WholeUnits, check_whole

LOOKED = "looked"
"""Columns of what each query head of a group gave a token: this word, and the head's number in its group."""


def looked(head: int) -> str:
    """The column of what query head `head` of a group gave each token."""
    return f"{LOOKED}{head}"


@dataclass(frozen=True)
class Representatives:
    """Of each unit of `unit` tokens, for each query head, the mean of the keys before RoPE of `number` of its tokens.

    Those are the tokens that the head gave most, by the columns `looked` (InfLLM, arXiv:2402.04617); ties go to the
    earlier one. Where fewer of a unit's tokens were looked at, the mean is of all its keys. A query asks as if it stood
    `distance` tokens behind all of them. A unit that still grows must be read anyhow. In the model's dtype G numbers
    of each channel for `unit` keys and values: G / (2 unit) of the cache.
    """

    unit: int = 128
    number: int = 4
    distance: int = 4095
    enough = 0
    turns = True

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)
        check_int("number", self.number, 1)
        check_int("distance", self.distance, 0)

    def open(self, spec: Spec) -> "RepresentativesOf":
        """Raises ValueError where the layer's rotation is not known."""
        if spec.rope is None:
            raise ValueError(f"index={self} needs the model's RoPE, and layer {spec.layer} has none that is known")
        width, told = self._sizes(spec)
        return RepresentativesOf.empty(self, spec, width, told, torch.float32)

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_whole(spec, tensors, counts, self.unit, *self._sizes(spec), torch.float32)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "RepresentativesOf":
        return RepresentativesOf.restored(self, spec, tensors)

    def _sizes(self, spec: Spec) -> tuple[int, int]:
        """Numbers of a unit, and of a token that waits for one to be whole."""
        return spec.group * spec.key_size, spec.key_size + spec.group


class RepresentativesOf(WholeUnits):
    """`held` (B, H, N, G D): of each query head of a KV head's group its mean key."""

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Remembered.columns`."""
        return tuple(map(looked, range(self.spec.group)))

    def told(self, tokens: Chunk) -> Float[Tensor, "B H T W"]:
        """See `WholeUnits.told`: the key as the model made it, before RoPE, and what each query head gave it."""
        assert self.spec.rope is not None  # `Representatives.open` asks for it
        plain = self.spec.rope.shift(tokens.keys.float(), -tokens.positions)
        return torch.cat([plain, torch.stack([tokens.columns[name].float() for name in self.columns], -1)], -1)

    def made(self, told: Float[Tensor, "B H T W"]) -> Float[Tensor, "B H N E"]:
        """See `WholeUnits.made`."""
        (b, h, t, width), unit, group = told.shape, self.unit, self.spec.group
        units = told[:, :, : t // unit * unit].reshape(b, h, t // unit, unit, width)
        keys, given = units[..., :-group], units[..., -group:]  # B H N C D, B H N C G
        number = min(self.recipe.number, unit)
        best = given.argsort(dim=3, descending=True, stable=True)[..., :number, :]  # B H N K G
        means = []
        for head in range(group):
            at = best[..., head]
            chosen = keys.gather(3, at[..., None].expand(*at.shape, keys.shape[-1])).double().mean(3)
            enough = (given[..., head] > 0).sum(3) >= number
            means.append(torch.where(enough[..., None], chosen, keys.double().mean(3)))
        return torch.cat(means, -1)

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """See `Remembered.asks`: as far behind all keys as the recipe says."""
        return from_behind(self.spec, q, seen, self.recipe.distance)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not divided by sqrt(D). What it says of a unit that is not whole has no meaning."""
        held = self.held[:, :, : int(units.max(initial=0))].float()
        held = held.reshape(*held.shape[:3], *asked.shape[2:])
        return behind(torch.einsum("bhgd,bhngd->bhgn", asked.float(), held), units)


register("representatives", Representatives)
