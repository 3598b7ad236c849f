"""Summed: tokens that are gone, their sums a state that answers as linear attention (LESS, arXiv:2402.09398)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats.feature_maps import FeatureMaps, maps_of
from kvfold.formats.paged import one_each, said_counts
from kvfold.formats.segment import Segment, Spec, Traits, Uncaptured
from kvfold.formats.tokens import POSITION, Chunk
from kvfold.options import check_int, shown
from kvfold.pages import PagePool
from kvfold.rotation import Compact

BLOCK = 1024
"""Tokens or queries whose hidden numbers are there at once."""


@dataclass(frozen=True)
class Summed:
    """R (D + 1) numbers in float32 for each (row, KV head), however many tokens went there: their sum psi(k)^T v and
    their sum psi(k). What goes there is gone as a token: it counts in no budget, and no column of it is left.

    `maps` names the feature maps (`feature_maps.bring`), `layer` says which layer's of them. A crop of text of which
    nothing was folded in changes nothing, one of the whole text empties the state, any other is refused.
    """

    maps: str
    layer: int

    traits: ClassVar[Traits] = Traits(addressed="whole", holds=False)

    def __post_init__(self) -> None:
        given: object = self.maps
        if not isinstance(given, str) or not re.fullmatch("[0-9a-f]{16}", given):
            raise ValueError(f"maps={shown(self.maps)} must be 16 hex digits")
        check_int("layer", self.layer, 0)

    def of(self, spec: Spec) -> FeatureMaps:
        """The maps. Raises ValueError where nobody has brought them, and for those of another shape."""
        maps = maps_of(self.maps, self.layer, spec.device)
        if tuple(maps.k1.shape[:2]) != (spec.heads, spec.key_size):
            raise ValueError(
                f"maps={self.maps!r} are of {maps.k1.shape[0]} KV heads with keys of {maps.k1.shape[1]}; layer "
                f"{spec.layer} has {spec.heads} with keys of {spec.key_size}"
            )
        return maps

    def open(self, spec: Spec) -> "SummedSegment":
        rank = self.of(spec).k3.shape[-1]
        sums = torch.zeros(spec.rows, spec.heads, rank, spec.value_size, dtype=torch.float32, device=spec.device)
        upto = np.zeros((spec.rows, spec.heads), dtype=np.int64)
        return SummedSegment(self, spec.key_size, spec.dtype, sums, sums.new_zeros(sums.shape[:3]), upto)

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """See `Format.check`."""
        rank = self.of(spec).k3.shape[-1]
        if said_counts(spec, said).any():
            raise ValueError(f"counts={shown(said['counts'])} must be 0: no token is held")
        upto = said_counts(spec, said, "upto")
        if seen is not None and (upto > seen[:, None]).any():
            raise ValueError(f"upto={shown(said['upto'])} must be no more than the tokens read, {seen.tolist()}")
        shapes = {"sums": (spec.rows, spec.heads, rank, spec.value_size), "mass": (spec.rows, spec.heads, rank)}
        for name in (*shapes, *sorted(tensors.keys() - shapes.keys())):
            found = tensors.get(name)
            if found is None or tuple(found.shape) != shapes.get(name) or found.dtype != torch.float32:
                held = None if found is None else (tuple(found.shape), found.dtype)
                raise ValueError(f"{name}={held} must be {(shapes.get(name), torch.float32)} (shape, dtype)")
        if not bool(tensors["sums"].isfinite().all() and tensors["mass"].isfinite().all()):
            raise ValueError("sums and mass must be finite")
        if bool((tensors["mass"] < 0).any()):
            raise ValueError("mass must be no less than 0")

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "SummedSegment":
        """See `Format.restore`."""
        if twin is not None:
            raise ValueError("of: a state is held by one layer alone")
        self.check(spec, said, tensors)
        sums, mass = (tensors[name].to(spec.device, copy=True) for name in ("sums", "mass"))
        return SummedSegment(self, spec.key_size, spec.dtype, sums, mass, said_counts(spec, said, "upto"))


class SummedSegment(Uncaptured):
    """`sums` and `mass` of the tokens that were folded in, and `upto`: the place behind the last of them, 0: none."""

    def __init__(
        self, form: Summed, key_size: int, compute: torch.dtype, sums: Float[Tensor, "B H R Dv"],
        mass: Float[Tensor, "B H R"], upto: np.ndarray,
    ):  # fmt: skip
        self.form, self.key_size, self.compute = form, key_size, compute
        self.sums, self.mass, self.upto = sums, mass, upto

    @property
    def _maps(self) -> FeatureMaps:
        return maps_of(self.form.maps, self.form.layer, self.sums.device)

    # -- what it answers ---------------------------------------------------------------------------------------

    def nbytes_with(self, more: np.ndarray) -> int:
        """See `Segment.nbytes_with`: a state is as large whatever was folded in."""
        return self.nbytes

    @property
    def filled(self) -> bool:
        """Whether any token was folded in."""
        return bool(self.upto.any())

    def attend(
        self, q: Float[Tensor, "B H G Q D"], scale: float, *, read: Tensor | None = None,
        compact: Compact | None = None, weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """phi(q) sums / (phi(q) mass) and log phi(q) mass: beside exp(q k / sqrt(D)), with no shift of its own.

        A state of which a query gets nothing, an empty one first of all, has the log-sum-exp -inf. It has no slots: a
        `read` concerns tokens, and rows whose positions are `compact` have no state.
        """
        parts = [self._answer(some) for some in torch.split(q, BLOCK, 3)]
        out, lse = (torch.cat(each, 3) for each in zip(*parts, strict=True))
        return out.to(q.dtype), lse, lse.new_zeros(*lse.shape, 0) if weights else None

    def _answer(self, q: Float[Tensor, "B H G Q D"]) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"]]:
        b, h, g, n, d = q.shape
        phi = self._maps.phi(q.reshape(b, h * g, n, d)).view(b, h, g * n, -1)
        mass = (phi @ self.mass[..., None])[..., 0]  # B H (G Q)
        out = (phi @ self.sums) / mass.masked_fill(mass == 0, 1.0)[..., None]
        return out.view(b, h, g, n, -1), mass.log().view(b, h, g, n)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.append(one_each(k, v, positions), even=True)
        return self.attend(q, scale, weights=weights)

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Fold the chunk's valid tokens in."""
        if not chunk.valid.shape[-1]:
            return
        sums, mass = self.sums, self.mass
        blocks = zip(*(torch.split(x, BLOCK, 2) for x in (chunk.keys, chunk.values, chunk.valid)), strict=True)
        for keys, values, valid in blocks:
            gone = ~valid[..., None]  # whose keys and values may be anything
            psi = self._maps.psi(keys).masked_fill(gone, 0.0)
            sums = sums + psi.mT @ values.float().masked_fill(gone, 0.0)
            mass = mass + psi.sum(2)
        ends = (chunk.positions.long() + 1).masked_fill(~chunk.valid, 0).amax(-1)
        self.sums, self.mass, self.upto = sums, mass, np.maximum(self.upto, ends.cpu().numpy())

    # -- what it holds -----------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return len(self.upto)

    @property
    def nbytes(self) -> int:
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        """The maps are the model's, as its weights are, and not counted."""
        return self.sums.nbytes + self.mass.nbytes + self.upto.nbytes

    def row_nbytes(self) -> np.ndarray:
        return np.full(self.batch, (self.sums.nbytes + self.mass.nbytes) // max(1, self.batch))

    @property
    def longest(self) -> int:
        return 0

    def counts(self) -> np.ndarray:
        return np.zeros_like(self.upto)

    def lengths(self) -> np.ndarray:
        return np.zeros_like(self.upto)

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        """None: it has no pages."""
        return {}

    def columns(self) -> tuple[Bool[Tensor, "B H T"], Mapping[str, Tensor]]:
        nobody = self.mass.new_zeros(*self.mass.shape[:2], 0)
        return nobody.bool(), {POSITION: nobody.int()}

    def dense(self) -> Chunk:
        valid, columns = self.columns()
        keys = self.sums.new_zeros(*valid.shape, self.key_size, dtype=self.compute)
        return Chunk(keys, keys.new_zeros(*valid.shape, self.sums.shape[-1]), valid, columns)

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        return  # there is no token that could go

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """Raises ValueError for any slot: there are no tokens to write over."""
        if bool((slots >= 0).any()):
            raise ValueError(f"slots={shown(slots.tolist())} must be -1: {self.form} holds no tokens")

    # -- what is taken back ------------------------------------------------------------------------------------

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        return  # see `cropped`

    def check_cropped(self, limit: np.ndarray) -> None:
        """Raise ValueError where text from position `limit` (B,) on was folded in, but for a whole text."""
        wrong = (limit[:, None] < self.upto).any(1) & (limit > 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"{self.form} can't take tokens back: row {row} has tokens up to {int(self.upto[row].max())} folded "
                f"into its state, and {int(limit[row])} would be left of its text"
            )

    def cropped(self, limit: np.ndarray) -> None:
        """A row of which no text is left begins anew."""
        self.check_cropped(limit)
        self._empty(limit == 0)

    def _empty(self, rows: np.ndarray) -> None:
        if rows.any():
            gone = torch.from_numpy(rows).to(self.sums.device)[:, None, None]
            self.sums, self.mass = self.sums.masked_fill(gone[..., None], 0.0), self.mass.masked_fill(gone, 0.0)
            self.upto = np.where(rows[:, None], 0, self.upto)

    def clear(self) -> None:
        self._empty(np.ones(self.batch, dtype=bool))

    def drop_tokens(self) -> None:
        return  # which are in the state for good

    # -- rows --------------------------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> "SummedSegment":
        chosen = torch.from_numpy(np.asarray(rows)).to(self.sums.device)
        state = self.sums[chosen], self.mass[chosen], self.upto[np.asarray(rows)]
        return SummedSegment(self.form, self.key_size, self.compute, *state)

    def join(self, other: Any) -> None:
        """Raises ValueError where it is no segment of the same format."""
        if not isinstance(other, SummedSegment) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        self.sums, self.mass = torch.cat([self.sums, other.sums]), torch.cat([self.mass, other.mass])
        self.upto = np.concatenate([self.upto, other.upto])

    def compact(self) -> None:
        return  # nothing is held that no row has

    @property
    def shared(self) -> bool:
        return False

    def same_pages(self, other: Any) -> bool:
        """Never: it has none."""
        return False

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said = {"counts": self.counts().tolist(), "upto": self.upto.tolist()}
        return said, {"sums": self.sums.contiguous(), "mass": self.mass.contiguous()}
