"""The mean of a unit's keys, and how well it stands for them (ShadowKV's landmarks and outliers)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.formats.chunks import chunk_means
from kvfold.options import check_int
from kvfold.selectors.held import HELD, HeldUnits, behind, check_held, nothing

OPEN = "open"
"""What the keys of units that still grow are called in a state."""


@dataclass(frozen=True)
class Means:
    """Of each unit of `unit` tokens the mean of its keys, after RoPE, and the least cosine of one of them with it.

    Landmarks of ShadowKV (arXiv:2410.21465): a query is asked by its product with the mean. A unit that still grows has
    none, and must be read anyhow; its keys are kept until it is whole, so that a mean that came token by token is that
    of all at once, bit for bit. D + 1 numbers for `unit` keys and values in the model's dtype: 1 / (2 unit) of the
    cache.
    """

    unit: int = 8

    unlike: ClassVar[bool] = True
    """Whether it knows which units it stands for badly (`kvfold.selectors.odd.Unlike`)."""

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "MeansOf":
        return MeansOf(self, spec, nothing(spec, spec.key_size + 1), _none_open(self, spec))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, {n: x for n, x in tensors.items() if n != OPEN}, counts, self.unit, spec.key_size + 1)
        want, found = _none_open(self, spec), tensors.get(OPEN)
        if found is None or found.shape != want.shape or found.dtype != want.dtype:
            said = None if found is None else (tuple(found.shape), found.dtype)
            raise ValueError(f"{OPEN}={said} must be {(tuple(want.shape), want.dtype)} (shape, dtype)")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "MeansOf":
        held, still = (tensors[name].to(spec.device).clone() for name in (HELD, OPEN))
        return MeansOf(self, spec, held, still)


def _none_open(form: Means, spec: Spec) -> Float[Tensor, "B H C D"]:
    return torch.zeros(spec.rows, spec.heads, form.unit, spec.key_size, dtype=spec.dtype, device=spec.device)


class MeansOf(HeldUnits):
    """`held` (B, H, N, D + 1): the mean, then the cosine; of a unit that is not whole, 2. `still` (B, H, unit, D)."""

    fill = 2.0  # no cosine

    def __init__(
        self, recipe: Means, spec: Spec, held: Float[Tensor, "B H N E"], still: Float[Tensor, "B H C D"]
    ):  # fmt: skip
        super().__init__(recipe, spec, held)
        self.still = still

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.still.nbytes

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        return super().nbytes_with(units) + self.still.nbytes

    def row_nbytes(self) -> np.ndarray:
        sizes: np.ndarray = super().row_nbytes() + self.still.nbytes // max(1, len(self.still))
        return sizes

    # -- tokens ------------------------------------------------------------------------------------------------

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        valid, unit = tokens.valid, self.unit
        if not bool(valid.any()):
            return
        more = valid.sum(-1).cpu().numpy()
        first, known = start // unit, start % unit
        there = known + more
        # What is still open and what comes, side by side from where the open unit begins.
        wide = -(-int(there.max()) // unit) * unit
        keys = self.still.new_zeros(*more.shape, wide, self.still.shape[-1])
        keys[:, :, :unit] = self.still
        row, head, slot = valid.nonzero(as_tuple=True)
        place = (self._at(known)[..., None] + valid.cumsum(-1) - 1)[row, head, slot]
        keys[row, head, place] = tokens.keys[row, head, slot].to(keys.dtype)
        whole = np.where(more > 0, there // unit, 0)
        self.reach(int((-(-(start + more) // unit)).max()))
        if whole.any():
            made = torch.cat([x if x.dim() == 4 else x[..., None] for x in chunk_means(keys, unit)], -1)
            row, head, number = (torch.arange(made.shape[2], device=valid.device) < self._at(whole)[..., None]).nonzero(
                as_tuple=True
            )
            self.held[row, head, self._at(first)[row, head] + number] = made[row, head, number]
        offset = torch.arange(unit, device=valid.device) + self._at(whole)[..., None] * unit
        rest = keys.gather(2, offset.clamp(max=wide - 1)[..., None].expand(-1, -1, -1, keys.shape[-1]))
        self.still = rest.masked_fill((offset >= self._at(there)[..., None])[..., None], 0.0)

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`. The open unit stays where it is the last of them."""
        super().forget(units)
        last = self._at(units)[..., None] - 1
        if self.held.shape[2]:
            cosine = self.held[..., -1].gather(-1, last.clamp(min=0, max=self.held.shape[2] - 1))
            closed = (cosine != self.fill) | (last < 0)
            self.still = self.still.masked_fill(closed[..., None], 0.0)
        else:
            self.still = torch.zeros_like(self.still)

    def _at(self, numbers: Int[np.ndarray, "B H"]) -> Int[Tensor, "B H"]:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.held.device)

    # -- what they say -----------------------------------------------------------------------------------------

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; not divided by sqrt(D). What it says of a unit that is not whole has no meaning."""
        return behind(asked.float() @ self.held[:, :, : int(units.max(initial=0)), :-1].float().mT, units)

    def unlike(self, units: int) -> Float[Tensor, "B H N"]:
        """See `Unlike.unlike`: minus the least cosine that a key of a unit has with their mean."""
        return -self.held[:, :, :units, -1].float()

    # -- rows --------------------------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> "MeansOf":
        """See `Remembered.select`."""
        at = torch.from_numpy(np.asarray(rows)).to(self.held.device)
        return MeansOf(self.recipe, replace(self.spec, rows=len(at)), self.held[at], self.still[at])

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        super().join(other)
        self.still = torch.cat([self.still, other.still])

    def clear(self) -> None:
        super().clear()
        self.still = torch.zeros_like(self.still)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {OPEN: self.still}


register("means", Means)
