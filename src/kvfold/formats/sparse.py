"""Sparse: of keys and values the largest numbers and a bitmap, behind them a window (Mustafar, arXiv:2505.22913)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.by_token import TokenSegment
from kvfold.formats.dense import Dense, DenseSegment
from kvfold.formats.paged import check_positions, check_tensors, open_table, refilled, said_counts
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.formats.windowed import WindowedSegment, parts_of
from kvfold.ops.attend import blocked
from kvfold.ops.sparse.packing import kept_of, map_bytes, marked, pack, unpack
from kvfold.options import check_int, check_number, shown
from kvfold.pages import PAGE_SIZE, PageTable, Plane
from kvfold.rotation import Compact

KEY_MAP, VALUE_MAP = "key_map", "value_map"
"""Planes (uint8): a bit for each channel that is kept."""
MAPS = {"keys": KEY_MAP, "values": VALUE_MAP}
MOST = 0.99
"""The largest sparsity."""


@dataclass(frozen=True)
class Sparse:
    """The numbers of the largest magnitude of each key and each value in the model's dtype, a bitmap of their channels,
    and the newest tokens as they are.

    As soon as a (row, head) has `residual + group` tokens in its window, the oldest `group` of them are pruned: once,
    so that streaming gives what one shot gives. Of D numbers D - max(1, int(sparsity * D)) + 1 stay, as published, and
    never more: of equal magnitudes the earlier channels stay, so that a token is a record of a fixed size that can be
    dropped or written over by itself. What is not finite is larger than all that is. A crop leaves what was pruned as
    it is, and the window shorter.
    Differs from the paper: records of tokens in place of tiles of 64 numbers with padding and offsets; ties are cut.
    """

    key_sparsity: float = 0.5
    value_sparsity: float = 0.5
    residual: int = 32
    group: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits(crops="approximate")

    def __post_init__(self) -> None:
        check_number("key_sparsity", self.key_sparsity, 0.0, MOST)
        check_number("value_sparsity", self.value_sparsity, 0.0, MOST)
        check_int("residual", self.residual, 0)
        check_int("group", self.group, 1)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What a token has that was pruned."""
        keys, values = kept_of(spec.key_size, self.key_sparsity), kept_of(spec.value_size, self.value_sparsity)
        return {
            "keys": Plane(keys, spec.dtype), KEY_MAP: Plane(map_bytes(spec.key_size), torch.uint8),
            "values": Plane(values, spec.dtype), VALUE_MAP: Plane(map_bytes(spec.value_size), torch.uint8),
            POSITION: Plane(None, torch.int32),
        }  # fmt: skip

    @property
    def newest(self) -> Dense:
        """The format of the window: so many tokens a page that a group is whole pages."""
        return Dense(page_size=math.gcd(self.group, PAGE_SIZE))

    def open(self, spec: Spec) -> "SparseSegment":
        newest = self.newest
        table = open_table(self, spec, self.planes(spec), PAGE_SIZE)
        tail = open_table(newest, spec, newest.planes(spec), newest.page_size, scattered=True)
        coded = SparsePages(table, spec.heads, spec.dtype, spec.key_size, spec.value_size)
        return SparseSegment(self, coded, DenseSegment(tail, spec.heads, spec.dtype))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        counts, coded = self._counts(spec, said)
        parts, newest = parts_of(tensors), self.newest
        check_tensors(parts[0], self.planes(spec), coded)
        check_tensors(parts[1], newest.planes(spec), counts - coded)
        for part, some in zip(parts, (coded, counts - coded), strict=True):
            check_positions(some, part[POSITION], seen)
        for name, size in (("keys", spec.key_size), ("values", spec.value_size)):
            count, bits = parts[0][name].shape[-1], marked(parts[0][MAPS[name]], 8 * map_bytes(size))
            wrong = (bits.sum(-1) != count) | bits[:, size:].any(-1)
            if bool(wrong.any()):
                token = int(wrong.nonzero()[0, 0])
                raise ValueError(f"{MAPS[name]} of token {token} must mark {count} of {size} channels")

    def _counts(self, spec: Spec, said: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each row, and how many of them are pruned, (B, H). ValueError where that can't be."""
        counts, coded = said_counts(spec, said), said_counts(spec, said, "coded")
        if (coded > counts).any():
            raise ValueError(f"coded={shown(said['coded'])} must be at most counts={shown(said['counts'])}")
        return counts, coded

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "SparseSegment":
        counts, coded = self._counts(spec, said)
        if twin is not None:
            wanted = [counts, coded]
            if isinstance(twin, SparseSegment) and np.array_equal([twin.counts(), twin.coded.counts()], wanted):
                return twin.select(np.arange(spec.rows))
            raise ValueError(f"counts={said['counts']} must be those of the segment that holds the same pages")
        self.check(spec, said, tensors)
        parts, segment = parts_of(tensors), self.open(spec)
        refilled(segment.coded, coded, parts[0])
        refilled(segment.tail, counts - coded, parts[1])
        return segment


class SparsePages(TokenSegment):
    """Tokens that were pruned."""

    codes = ("keys", "values", KEY_MAP, VALUE_MAP)

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype, key_size: int, value_size: int):
        super().__init__(table, heads, compute)
        self.sizes = {"keys": key_size, "values": value_size}

    def like(self, table: PageTable, rows: np.ndarray) -> "SparsePages":
        return SparsePages(table, self.heads, self.compute, *self.sizes.values())

    def encode(self, what: str, states: Float[Tensor, "*N D"]) -> dict[str, Tensor]:
        count, wide = self.pool.planes[what].shape[-1], states.reshape(-1, states.shape[-1])
        some = torch.split(wide, max(1, blocked.BLOCK_ELEMENTS // wide.shape[-1]))
        kept, maps = (torch.cat(x) for x in zip(*(pack(x, count) for x in some), strict=True))
        planes = {what: kept, MAPS[what]: maps}
        return {name: plane.view(*states.shape[:-1], plane.shape[-1]) for name, plane in planes.items()}

    def states(self, what: str) -> Tensor:
        return unpack(self.plane(what), self.plane(MAPS[what]), self.sizes[what]).to(self.compute)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        return ops.attend_sparse(
            q, self.table, scale, value_size=self.sizes["values"], mass=LOG_MASS if self.weighed else None, read=read,
            compact=compact, position=POSITION, weights=weights,
        )  # fmt: skip


class SparseSegment(WindowedSegment[SparsePages]):
    """Pruned tokens, then the newest."""

    def __init__(self, form: Sparse, coded: SparsePages, tail: DenseSegment):
        super().__init__(coded, tail)
        self.form = form

    @property
    def residual(self) -> int:
        return self.form.residual

    @property
    def group(self) -> int:
        return self.form.group

    def like(self, coded: SparsePages, tail: DenseSegment) -> "SparseSegment":
        return SparseSegment(self.form, coded, tail)

    def join(self, other: Any) -> None:
        if not isinstance(other, SparseSegment) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        super().join(other)
