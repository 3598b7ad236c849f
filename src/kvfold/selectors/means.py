"""The mean of a unit's keys, and how well it stands for them (ShadowKV's landmarks and outliers)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
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
        return MeansOf(self, spec, nothing(spec, spec.key_size + 1), nothing(spec, spec.key_size))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, {n: x for n, x in tensors.items() if n != OPEN}, counts, self.unit, spec.key_size + 1)
        still, least = tensors.get(OPEN), int((counts % self.unit).max(initial=0))
        fits = still is not None and still.dim() == 4 and least <= still.shape[2] <= self.unit
        want = (spec.rows, spec.heads, spec.key_size), spec.dtype
        if still is None or not fits or ((*still.shape[:2], still.shape[3]), still.dtype) != want:
            found = None if still is None else (tuple(still.shape), still.dtype)
            shape = spec.rows, spec.heads, f"{least} to {self.unit}", spec.key_size
            raise ValueError(f"{OPEN}={found} must be {(shape, spec.dtype)} (shape, dtype)")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "MeansOf":
        held, still = (tensors[name].to(spec.device).clone() for name in (HELD, OPEN))
        return MeansOf(self, spec, held, still)


class MeansOf(HeldUnits):
    """`held` (B, H, N, D + 1): mean and cosine, 2 of an open unit; `still` (B, H, C, D): that one's keys."""

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
        """See `Remembered.nbytes_with`; of keys of units that still grow as many as there are now."""
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
        wide = max(int(there.max()), self.still.shape[2])
        keys = self.still.new_zeros(*more.shape, wide, self.still.shape[-1])
        keys[:, :, : self.still.shape[2]] = self.still
        row, head, slot = valid.nonzero(as_tuple=True)
        place = (self._at(known)[..., None] + valid.cumsum(-1) - 1)[row, head, slot]
        keys[row, head, place] = tokens.keys[row, head, slot].to(keys.dtype)
        whole = np.where(more > 0, there // unit, 0)
        self.reach(int((-(-(start + more) // unit)).max()))
        if whole.any():
            means, alike = chunk_means(keys, unit)
            made = torch.cat([means, alike[..., None]], -1)
            closed = torch.arange(made.shape[2], device=valid.device) < self._at(whole)[..., None]
            row, head, number = closed.nonzero(as_tuple=True)
            self.held[row, head, self._at(first)[row, head] + number] = made[row, head, number]
        left = there - whole * unit
        offset = torch.arange(int(left.max()), device=valid.device)
        slots = (offset + self._at(whole)[..., None] * unit).clamp(max=wide - 1)
        rest = keys.gather(2, slots[..., None].expand(*slots.shape, keys.shape[-1]))
        self.still = rest.masked_fill((offset >= self._at(left)[..., None])[..., None], 0.0)

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`. The keys of an open unit stay where it is the last of them."""
        super().forget(units)
        known = self.held.shape[2]
        if not known:
            self.still = self.still[:, :, :0].clone()
            return
        last = self._at(units)[..., None] - 1
        cosine = self.held[..., -1].gather(-1, last.clamp(min=0, max=known - 1))
        closed = (cosine != self.fill) | (last < 0)
        self.still = self.still.masked_fill(closed[..., None], 0.0)

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
        most = max(self.still.shape[2], other.still.shape[2])
        self.still = torch.cat([F.pad(x, (0, 0, 0, most - x.shape[2])) for x in (self.still, other.still)])

    def clear(self) -> None:
        super().clear()
        self.still = self.still[:, :, :0].clone()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {OPEN: self.still}


register("means", Means)
