"""Pages of values, and beside them what the keys of all KV heads are made of (ShadowKV)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats.flat import Flat
from kvfold.formats.joint_keys import JOINT, LATENT, PIECE, JointKeys
from kvfold.formats.paged import PagedSegment, refilled
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.ops.attend import blocked
from kvfold.ops.attend.blocked import Answer, Block, attend_blocks
from kvfold.pages import PagePool, PageTable
from kvfold.rotation import Compact


class ShadowPages(PagedSegment):
    """Values and columns of each (row, head), and in `joint` keys of a row's heads, which hold the same tokens."""

    codes = ("values",)

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype, joint: JointKeys):
        super().__init__(table, heads, compute)
        self.joint = joint

    def like(self, table: PageTable, rows: np.ndarray) -> "ShadowPages":
        return ShadowPages(table, self.heads, self.compute, self.joint.select(rows))

    # -- sizes -------------------------------------------------------------------------------------------------

    def bytes_beside(self, counted: set[int]) -> int:
        return super().bytes_beside(counted) + self.joint.table.bytes_beside(counted) + self.joint.beside

    def nbytes_after(self, more: Int[np.ndarray, "B H"], apart: Int[np.ndarray, " B"]) -> int:
        """`nbytes` with `more` tokens in each row, a piece of its own, of whose keys `apart[b]` of a head are exact."""
        total: int = self.nbytes_with(more) + self.joint.more_bytes(more[:, 0], apart)
        return total

    def row_nbytes(self) -> np.ndarray:
        sizes: np.ndarray = super().row_nbytes() + self.joint.row_nbytes()
        return sizes

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        return super().pages_for(more) | {self.joint.table.pool: self.joint.table.pages_for(more[:, 0])}

    # -- writing -----------------------------------------------------------------------------------------------

    def fold(self, tokens: Flat, unit: int, outliers: int) -> None:
        """Tokens in the model's numbers, the same ones of all heads: see `JointKeys.fold`."""
        self.joint.fold(tokens, unit, outliers)
        self.table.add(tokens.counts, {name: plane for name, plane in tokens.planes.items() if name != "keys"})

    def set_columns(self, columns: Mapping[str, Tensor]) -> None:
        """Set columns (B, H, T) on all tokens."""
        rows, slots = self.table.spans()
        at = tuple(torch.from_numpy(x).to(self.pool.device) for x in (rows, slots))
        planes = {name: column.flatten(0, 1)[at] for name, column in self.add_columns(columns).items()}
        if planes:
            self.table.write(rows, slots, planes)

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """See `Segment.truncate`: of each row whole chunks stay."""
        super().truncate(counts, slack=slack)
        self.joint.truncate(counts[:, 0], slack=slack)

    # -- reading -----------------------------------------------------------------------------------------------

    def keys(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "B H N D"]:
        """Keys of some slots of all rows, float32."""
        return self.joint.of_slots(self.plane(POSITION, start, stop), start, stop)

    def states(self, what: str) -> Tensor:
        if what == "values":
            return self.plane(what).to(self.compute)
        most = torch.finfo(self.compute).max  # which a number that was rounded and turned may exceed
        step = max(1, blocked.BLOCK_ELEMENTS // max(1, self.table.rows * self.joint.exact.shape[-1]))
        ends = [*range(0, max(1, self.longest), step), self.longest]
        parts = [self.keys(*ends[i : i + 2]).clamp(-most, most).to(self.compute) for i in range(len(ends) - 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def listed_tokens(self, mask: Bool[Tensor, "B H T"]) -> tuple[dict[str, Tensor], Bool[Tensor, "B H N"]]:
        """Keys (float32), values and columns of the tokens that are marked, in order, and which slots have one.

        What it costs is theirs: no other is looked at.
        """
        row, head, slot = mask.nonzero(as_tuple=True)
        counts = mask.sum(-1)
        most = int(counts.max()) if mask.numel() else 0
        real = torch.arange(most, device=mask.device) < counts[..., None]
        rows, slots = (x.cpu().numpy() for x in (row * self.heads + head, slot))
        latents = self.joint.table.read((LATENT, PIECE), row.cpu().numpy(), slots)
        found = {**self.table.read(("values", *self.names().values()), rows, slots), **latents, "slot": slot}
        wide = {}
        for name, plane in found.items():
            wide[name] = plane.new_zeros(*real.shape, *plane.shape[1:])
            wide[name][real] = plane
        wide["keys"] = self.joint.rebuilt(wide.pop(LATENT), wide.pop(PIECE), wide.pop("slot"), wide[POSITION])
        return wide, real

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> Answer:  # fmt: skip
        """Over keys that are rebuilt, a block at a time, or those alone that `read` marks."""
        mass = LOG_MASS if self.weighed else None
        if read is None or compact is not None or weights:

            def block(start: int, stop: int) -> Block:
                return Block(self.keys(start, stop), self.plane("values", start, stop))

            return attend_blocks(
                q, scale, self.valid(), self.pool.planes["values"].shape[-1], block, self.column, mass=mass, read=read,
                compact=compact, weights=weights,
            )  # fmt: skip
        some, real = self.listed_tokens(read & self.valid())
        bias = torch.zeros(real.shape, dtype=torch.float32, device=real.device) if mass is None else some[mass].float()
        bias = bias.masked_fill(~real, -torch.inf)[:, :, None]
        b, h, g, n, d = q.shape
        out, lse = ops.attend(q.reshape(b, h, g * n, d), some["keys"], some["values"], scale, bias)
        return out.reshape(b, h, g, n, -1).to(q.dtype), lse.reshape(b, h, g, n), None

    # -- rows and pages ----------------------------------------------------------------------------------------

    @property
    def tables(self) -> tuple[PageTable, PageTable]:
        """All that its tokens lie on."""
        return self.table, self.joint.table

    def join(self, other: Any) -> None:
        super().join(other)
        self.joint.join(other.joint)

    def clear(self) -> None:
        super().clear()
        self.joint.clear()

    def compact(self) -> None:
        for table in self.tables:
            table.compact()

    @property
    def shared(self) -> bool:
        return any(table.shared for table in self.tables)

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        return said, tensors if of is not None else tensors | self.joint.state()

    def refill(self, counts: Int[np.ndarray, "B H"], tensors: Mapping[str, Tensor]) -> None:
        """What `state` gave and somebody has looked at; it is empty."""
        refilled(self, counts, {name: x for name, x in tensors.items() if name not in JOINT})
        self.joint.refill(counts[:, 0], tensors)
