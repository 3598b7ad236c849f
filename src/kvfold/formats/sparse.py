"""Sparse: of keys and values the largest numbers and a bitmap, behind them a window (Mustafar, arXiv:2505.22913)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.by_token import TokenSegment
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Spec, Traits
from kvfold.formats.tailed import Tailed
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.formats.windowed import WindowedSegment
from kvfold.ops.attend import blocked
from kvfold.ops.sparse.packing import kept_of, map_bytes, marked, pack, unpack
from kvfold.options import check_int, check_number
from kvfold.pages import PAGE_SIZE, PageTable, Plane
from kvfold.rotation import Compact

KEY_MAP, VALUE_MAP = "key_map", "value_map"
"""Planes (uint8): a bit for each channel that is kept."""
MAPS = {"keys": KEY_MAP, "values": VALUE_MAP}
MOST = 0.99
"""The largest sparsity."""


@dataclass(frozen=True)
class Sparse(Tailed):
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

    whole = False
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

    def open(self, spec: Spec) -> "SparseSegment":
        table = open_table(self, spec, self.planes(spec), PAGE_SIZE)
        coded = SparsePages(table, spec.heads, spec.dtype, spec.key_size, spec.value_size)
        return SparseSegment(self, coded, self.open_tail(spec))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        super().check(spec, said, tensors, seen)
        for name, size in (("keys", spec.key_size), ("values", spec.value_size)):
            count, maps = tensors[f"coded.{name}"].shape[-1], tensors[f"coded.{MAPS[name]}"]
            bits = marked(maps, 8 * map_bytes(size))
            wrong = (bits.sum(-1) != count) | bits[:, size:].any(-1)
            if bool(wrong.any()):
                token = int(wrong.nonzero()[0, 0])
                raise ValueError(f"{MAPS[name]} of token {token} must mark {count} of {size} channels")


class SparsePages(TokenSegment):
    """Tokens that were pruned."""

    codes = ("keys", "values", KEY_MAP, VALUE_MAP)
    listed = True

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
