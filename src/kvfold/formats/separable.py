"""Separable: pages of codes as Kivi's, values divided channel by channel beforehand (ZipCache, arXiv:2405.14256)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats.coded import CodedPages
from kvfold.formats.flat import Flat
from kvfold.formats.kivi import Kivi, KiviSegment
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Segment, Spec
from kvfold.formats.tailed import TailedSegment
from kvfold.formats.told import check_told, first_told, settled
from kvfold.ops.codes.naive import decoded_values, value_pages
from kvfold.pages import PageTable
from kvfold.rotation import Compact

WEIGHTS = "weights"
"""What a segment may be told of each (row, head): (B, H, Dv), what values are divided by."""
HELD = f"coded.{WEIGHTS}"
"""As a state names it."""


@dataclass(frozen=True)
class Separable(Kivi):
    """`Kivi` whose values are divided by weights, channel by channel, before they become codes; outputs are multiplied.

    So no channel that stands out takes all steps of a token's scale. A (row, head) has the first weights that it is
    told (`Hearing.hear`), for good; pages that come before have none.
    """

    group: int = 64
    channels: int = 1 << 16
    residual: int = 0

    beside = HELD

    def open(self, spec: Spec) -> "SeparableSegment":
        codes = open_table(self, spec, self.planes(spec), self.group)
        weights = torch.zeros(spec.rows, spec.heads, spec.value_size, dtype=torch.float32, device=spec.device)
        coded = SeparablePages(codes, spec.heads, spec.dtype, spec.value_size, self.bits, weights)
        return SeparableSegment(self, coded, self.open_tail(spec))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        check_told(HELD, tensors.get(HELD), (spec.rows, spec.heads, spec.value_size))
        super().check(spec, said, tensors, seen)

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "TailedSegment[Any]":
        segment = super().restore(spec, said, tensors, twin)
        if twin is None:
            segment.coded.weights = tensors[HELD].to(spec.device)
        return segment


class SeparablePages(CodedPages):
    """Pages of codes, and the weights of each (row, head), 0 where nobody has told any."""

    listed = False

    def __init__(
        self, table: PageTable, heads: int, compute: torch.dtype, value_size: int, bits: int,
        weights: Float[Tensor, "B H D"],
    ):  # fmt: skip
        super().__init__(table, heads, compute, value_size, bits)
        self.weights = weights

    @property
    def _shares(self) -> Float[Tensor, "B H D"]:
        return settled(self.weights)

    def _of(self, rows: np.ndarray) -> Float[Tensor, "N D"]:
        """The weights of some rows of the table."""
        return self._shares.flatten(0, 1)[self.place(rows)]

    def hear(self, told: Mapping[str, Tensor], which: Bool[Tensor, "B H"], counts: np.ndarray) -> None:
        """The weights of each (row, head) of `which` that has none; `counts` (B, H): all its tokens."""
        self.weights = first_told(WEIGHTS, self.weights, told, which, counts)

    # -- writing -----------------------------------------------------------------------------------------------

    def add_pages(self, tokens: Flat) -> None:
        if not tokens.counts.any():
            return
        values = tokens.planes["values"].float() / self._of(np.repeat(np.arange(self.table.rows), tokens.counts))
        super().add_pages(Flat(tokens.counts, {**tokens.planes, "values": values}))
        # Codes are there that were made without any: nobody may tell others any more.
        coded = torch.from_numpy(tokens.counts > 0).view(-1, self.heads, 1).to(self.weights.device)
        self.weights = torch.where(coded, self._shares, self.weights)

    def rewrite(self, rows: np.ndarray, slots: np.ndarray, keys: Tensor | None, values: Tensor | None) -> None:
        super().rewrite(rows, slots, keys, None if values is None else values.float() / self._of(rows))

    # -- reading -----------------------------------------------------------------------------------------------

    def read(self, rows: np.ndarray, slots: np.ndarray) -> dict[str, Tensor]:
        planes = self.table.read(("values", "value_scale", "value_zero"), rows, slots)
        codes, scale, zero = (planes[name] for name in ("values", "value_scale", "value_zero"))
        values = decoded_values(codes, scale, zero, self.value_size, self.bits) * self._of(rows)
        return super().read(rows, slots) | {"values": self._computed(values)}

    def _states(self, what: str, first: int, last: int) -> Float[Tensor, "B H T _"]:
        if what == "keys":
            return super()._states(what, first, last)
        wide = self._rows(value_pages(self.table, first, last, self.value_size, self.bits).flatten(1, 2))
        return self._computed(wide * self._shares[:, :, None])

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        out, lse, left = super().attend(q.float(), scale, read=read, compact=compact, weights=weights)
        return (out * self._shares[:, :, None, None]).to(q.dtype), lse, left

    # -- what is remembered beside the tokens ------------------------------------------------------------------

    def bytes_beside(self, counted: set[int]) -> int:
        return super().bytes_beside(counted) + self.weights.nbytes

    def like(self, table: PageTable, rows: np.ndarray) -> "SeparablePages":
        weights = self.weights[rows.tolist()]
        return SeparablePages(table, self.heads, self.compute, self.value_size, self.bits, weights)

    def join(self, other: Any) -> None:
        super().join(other)
        self.weights = torch.cat([self.weights, other.weights])

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        return said, tensors if of is not None else tensors | {WEIGHTS: self.weights.contiguous()}


class SeparableSegment(KiviSegment):
    """Pages of codes, then the newest tokens."""

    coded: SeparablePages

    def hear(self, told: Mapping[str, Tensor], which: Bool[Tensor, "B H"]) -> None:
        """See `SeparablePages.hear`."""
        self.coded.hear(told, which, self.counts())

    def same_pages(self, other: Any) -> bool:
        alike = isinstance(other, SeparableSegment) and torch.equal(self.coded.weights, other.coded.weights)
        return alike and super().same_pages(other)

    def clear(self) -> None:
        super().clear()
        self.coded.weights = torch.zeros_like(self.coded.weights)

    def drop_tokens(self) -> None:
        """Drop the tokens, but not what is remembered of the text."""
        super().clear()
