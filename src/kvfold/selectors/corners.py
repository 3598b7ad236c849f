"""Two corners of the box around a unit's keys, of which a query meets a mixture (MPCache)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats import Chunk, Spec, register
from kvfold.options import check_int, check_number
from kvfold.selectors.bounds import BoundsOf
from kvfold.selectors.held import HELD, check_held, narrow, nothing
from kvfold.selectors.places import Places, PlacesOf

PLACES = "places"
"""What its units' places are called in a state."""


@dataclass(frozen=True)
class Corners:
    """Of each unit of `unit` tokens what `Bounds` remembers, and its place; `parts` of them are a large one.

    A query q is told q (alpha high + (1 - alpha) low), by the largest and the least number of each channel of a unit's
    keys (MPCache, arXiv:2501.06807): linear, as secure computation wants it, and no bound of anything.
    """

    unit: int = 16
    parts: int = 2
    alpha: float = 0.6
    enough = 0

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)
        check_int("parts", self.parts, 1)
        check_number("alpha", self.alpha, 0.0, 1.0)

    def open(self, spec: Spec) -> "CornersOf":
        held = nothing(spec, 2 * spec.key_size, narrow(spec.dtype))
        return CornersOf(self, spec, held, Places(self.unit).open(spec))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        places = (spec.rows, spec.heads, -(-int(counts.max(initial=0)) // self.unit), 1), torch.int32
        check_held(spec, tensors, counts, self.unit, 2 * spec.key_size, narrow(spec.dtype), **{PLACES: places})

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "CornersOf":
        places = Places(self.unit).restore(spec, {HELD: tensors[PLACES]})
        return CornersOf(self, spec, tensors[HELD].to(spec.device).clone(), places)


class CornersOf(BoundsOf):
    """`held` (B, H, N, 2 D) as in `BoundsOf`; `places` says where units begin."""

    def __init__(self, recipe: Corners, spec: Spec, held: Float[Tensor, "B H N E"], places: PlacesOf):
        super().__init__(recipe, spec, held)
        self.places = places

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H 1 E"]:
        """See `Remembered.asks`: the mean of a group's queries, by how much each number of `held` counts."""
        mean, alpha = q.float().mean(2, keepdim=True), self.recipe.alpha
        return torch.cat([alpha * mean, (alpha - 1) * mean], -1)

    def scores(self, asked: Float[Tensor, "B H 1 E"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H 1 N"]:
        """See `Remembered.scores`; not scaled, which changes no order."""
        return ops.key_scores(asked, self.held, units, 0)

    def large_scores(self, asked: Float[Tensor, "B H 1 E"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H 1 M"]:
        """The same of large units, of which the last may have fewer parts."""
        parts, (b, h, n, e) = self.recipe.parts, self.held.shape
        held = torch.nn.functional.pad(self.held, (0, 0, 0, -n % parts), value=self.fill)
        large = held.view(b, h, -1, parts, e).amax(3)
        return ops.key_scores(asked, large, -(-units // parts), 0)

    # -- the places go along -------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.places.nbytes

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        return super().nbytes_with(units) + self.places.nbytes_with(units)

    def row_nbytes(self) -> np.ndarray:
        sizes: np.ndarray = super().row_nbytes() + self.places.row_nbytes()
        return sizes

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        super().extend(tokens, start)
        self.places.extend(tokens, start)

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`."""
        super().forget(units)
        self.places.forget(units)

    def select(self, rows: np.ndarray) -> "CornersOf":
        """See `Remembered.select`."""
        places = self.places.select(rows)
        at = torch.from_numpy(np.asarray(rows)).to(self.held.device)
        return CornersOf(self.recipe, places.spec, self.held[at], places)

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        super().join(other)
        self.places.join(other.places)

    def clear(self) -> None:
        super().clear()
        self.places.clear()

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), PLACES: self.places.held}


register("corners", Corners)
