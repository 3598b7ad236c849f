"""Uneven: keys before RoPE by channel, values by token, in uneven levels, a few numbers whole (arXiv:2401.18079)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import levels
from kvfold.formats.levels import BITS, Levels
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk
from kvfold.formats.told import Telling, Told, check_told
from kvfold.ops.attend import blocked
from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.codes.packing import pack, unpack, width
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE, PageTable, Plane
from kvfold.rotation import Compact, Rope

LEVELS = "levels"
"""What a segment may be told of each (row, head): (B, H, W), `Levels.flat`."""
KINDS = {"keys": "key", "values": "value"}


@dataclass(frozen=True)
class Uneven(Telling):
    """2^bits levels that are told (`Hearing.hear`), and of each key and each value `exact` numbers as they are.

    Keys are turned back to position 0, where a channel's numbers stay in one range, and coded in that of each channel;
    the `exact` numbers furthest outside stay in the model's dtype, with their places. Of a value those furthest from
    its median do; the others are coded in their own range. Keys are turned to their positions when they are read, a
    block of tokens at a time. Where a layer's rotation is not known they are held as they come.
    A (row, head) has the first levels that it is told, for good. Tokens that come before have those of normal numbers,
    of keys with variance 1: what lies far outside is cut. Addressable token by token, exact to crop; what is amended is
    rounded. Ranges of values are float16, or float32 in a float32 model; in a narrow model they end at 65504.
    Of numbers that are not finite at most `exact` stay so in each key; the rest of a value is then not finite.
    """

    bits: int = 4
    exact: int = 1
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits(frame="unrotated")
    beside = LEVELS

    def __post_init__(self) -> None:
        check_int("bits", self.bits, min(BITS), high=max(BITS))
        check_int("exact", self.exact, 1)
        check_int("page_size", self.page_size, 1)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start. Raises ValueError where a vector has fewer numbers than stay."""
        kind, planes = torch.float16 if spec.dtype.itemsize == 2 else torch.float32, {}
        for what, size in (("keys", spec.key_size), ("values", spec.value_size)):
            if self.exact > size:
                raise ValueError(f"exact={self.exact} must be at most the {KINDS[what]} size {size}")
            planes[what] = Plane(width(size, self.bits), torch.uint8)
            planes[f"{KINDS[what]}_exact"] = Plane(self.exact, spec.dtype)
            planes[f"{KINDS[what]}_at"] = Plane(self.exact, torch.uint8 if size <= 256 else torch.int16)
        scales = {name: Plane(None, kind) for name in ("value_centre", "value_reach")}
        return planes | scales | {POSITION: Plane(None, torch.int32)}

    def open(self, spec: Spec) -> "UnevenSegment":
        table = open_table(self, spec, self.planes(spec), self.page_size)
        shape = spec.rows, spec.heads, levels.width(spec.key_size, self.bits)
        nobody = torch.zeros(shape, dtype=torch.float32, device=spec.device)
        sizes = {"keys": spec.key_size, "values": spec.value_size}
        return UnevenSegment(table, spec.heads, spec.dtype, self, sizes, spec.rope, nobody)

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        shape = spec.rows, spec.heads, levels.width(spec.key_size, self.bits)
        check_told(LEVELS, tensors.get(LEVELS), shape, signed=True)
        super().check(spec, said, tensors, seen)
        for what, size in (("keys", spec.key_size), ("values", spec.value_size)):
            places = tensors[f"{KINDS[what]}_at"].int()
            if bool(((places < 0) | (places >= size)).any()):
                raise ValueError(f"{KINDS[what]}_at must be channels below {size}")


class UnevenSegment(Told):
    """Codes, numbers that are whole and their places, and the levels of each (row, head), 0 where nobody told any."""

    name = LEVELS
    codes = (
        "keys", "key_exact", "key_at", "values", "value_exact", "value_at", "value_centre", "value_reach",
    )  # fmt: skip

    def __init__(
        self, table: PageTable, heads: int, compute: torch.dtype, form: Uneven, sizes: Mapping[str, int],
        rope: Rope | None, told: Float[Tensor, "B H W"],
    ):  # fmt: skip
        super().__init__(table, heads, compute)
        self.form, self.sizes, self.rope, self.told = form, sizes, rope, told

    def like(self, table: PageTable, rows: np.ndarray) -> "UnevenSegment":
        told = self.told[torch.from_numpy(rows).to(self.told.device)]
        return UnevenSegment(table, self.heads, self.compute, self.form, self.sizes, self.rope, told)

    def hear(self, told: Mapping[str, Tensor], which: Bool[Tensor, "B H"]) -> None:
        """The levels of each (row, head) of `which` that has none. Raises ValueError for levels of another size."""
        if LEVELS in told and told[LEVELS].shape != self.told.shape:
            raise ValueError(f"{LEVELS}={tuple(told[LEVELS].shape)} must be {tuple(self.told.shape)} (shape)")
        super().hear(told, which)

    @property
    def settled(self) -> Float[Tensor, "B H W"]:
        usual = Levels.normal(self.sizes["keys"], self.form.bits, self.told.device).flat()
        return torch.where((self.told == 0).all(-1, keepdim=True), usual, self.told)

    @property
    def known(self) -> Levels:
        """The levels that count."""
        return Levels.of(self.settled, self.sizes["keys"], self.form.bits)

    # -- writing -----------------------------------------------------------------------------------------------

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        still = self._turned(chunk.keys.float(), -chunk.positions)
        super().append(Chunk(still, chunk.values, chunk.valid, chunk.columns), even=even)

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        if keys is not None and self.longest:
            at = self.plane(POSITION).gather(-1, slots.clamp(min=0, max=self.longest - 1))
            keys = self._turned(keys.float(), -at)
        super().amend(slots, keys, values)

    def _turned(self, states: Float[Tensor, "B H T D"], steps: Int[Tensor, "B H T"]) -> Float[Tensor, "B H T D"]:
        return states if self.rope is None else self.rope.shift(states, steps)

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        """What planes hold of keys at position 0, or of values: of each token the same, whatever comes with it."""
        step = max(1, blocked.BLOCK_ELEMENTS // max(1, self.table.rows * states.shape[-1]))
        made = self._coded_keys if what == "keys" else self._coded_values
        parts = [made(some.float()) for some in torch.split(states, step, 2)]
        return parts[0] if len(parts) == 1 else {name: torch.cat([x[name] for x in parts], 2) for name in parts[0]}

    def _coded_keys(self, states: Float[Tensor, "B H T D"]) -> dict[str, Tensor]:
        known = self.known
        shares = levels.in_range(states, known.centre[:, :, None], known.reach[:, :, None])
        apart = levels.furthest(shares, self.form.exact)
        return self._planes("keys", states, levels.nearest(shares, known.keys), apart)

    def _coded_values(self, states: Float[Tensor, "B H T D"]) -> dict[str, Tensor]:
        apart = levels.outstanding(states, self.form.exact)
        kind = self.pool.specs["value_centre"].dtype
        centre, reach = (_held(x, kind) for x in levels.ends(states, apart))
        shares = levels.in_range(states, centre.float(), reach.float())
        planes = self._planes("values", states, levels.nearest(shares, self.known.values), apart)
        return planes | {"value_centre": centre[..., 0], "value_reach": reach[..., 0]}

    def _planes(
        self, what: str, states: Tensor, codes: Int[Tensor, "B H T D"], apart: Bool[Tensor, "B H T D"]
    ) -> dict[str, Tensor]:
        shape = *states.shape[:-1], self.form.exact
        at = apart.nonzero()[:, -1].view(shape).to(self.pool.specs[f"{KINDS[what]}_at"].dtype)
        whole = _held(states[apart], self.compute).view(shape)
        # Nobody reads the codes of what is whole: zeros, so that what is held is told by the numbers alone.
        packed = pack(codes.masked_fill(apart, 0).to(torch.uint8), self.form.bits)
        return {what: packed, f"{KINDS[what]}_exact": whole, f"{KINDS[what]}_at": at}

    # -- reading -----------------------------------------------------------------------------------------------

    def numbers(self, what: str, start: int = 0, stop: int | None = None) -> Float[Tensor, "B H T _"]:
        """Keys, at their positions, or values of some slots, float32."""
        known, size, bits = self.known, self.sizes[what], self.form.bits
        codes = unpack(self.plane(what, start, stop), size, bits).int()
        rows = torch.arange(self.table.rows, dtype=torch.int32, device=codes.device).view(-1, self.heads, 1, 1)
        wide = known.said(what).flatten()[codes + (rows << bits)]
        if what == "keys":
            wide.mul_(known.reach[:, :, None]).add_(known.centre[:, :, None])
        else:
            centre, reach = (self.plane(name, start, stop).float() for name in ("value_centre", "value_reach"))
            wide.mul_(reach[..., None]).add_(centre[..., None])
        at, whole = (self.plane(f"{KINDS[what]}_{name}", start, stop) for name in ("at", "exact"))
        at = at.long().clamp_(min=0, max=size - 1)  # slots without a token hold anything
        wide.scatter_(-1, at, whole.float())
        return self._turned(wide, self.plane(POSITION, start, stop)) if what == "keys" else wide

    def states(self, what: str) -> Tensor:
        most = torch.finfo(self.compute).max  # which a number that was rounded and turned may exceed
        step = max(1, blocked.BLOCK_ELEMENTS // max(1, self.table.rows * self.sizes[what]))
        ends = [*range(0, max(1, self.longest), step), self.longest]
        parts = [self.numbers(what, *ends[i : i + 2]).clamp(-most, most).to(self.compute) for i in range(len(ends) - 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Over the codes as they are stored, a block at a time: a query turned for each key would cost G times that."""

        def block(start: int, stop: int) -> Block:
            return Block(*(self.numbers(what, start, stop) for what in ("keys", "values")))

        mass = LOG_MASS if self.weighed else None
        return attend_blocks(
            q, scale, self.valid(), self.sizes["values"], block, self.column, mass=mass, read=read, compact=compact,
            weights=weights,
        )  # fmt: skip

    def join(self, other: Any) -> None:
        if not isinstance(other, UnevenSegment) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        super().join(other)


def _held(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in a narrower dtype: what it can't hold is its largest number, what is not finite stays so."""
    most = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return torch.where(x.isfinite(), x.clamp(-most, most), x).to(dtype)
