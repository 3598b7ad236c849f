"""Thin: of the keys of each (row, KV head) the same few channels, of values all (ThinK, arXiv:2407.21018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.by_token import ByToken, TokenSegment
from kvfold.formats.paged import open_table, said_counts
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk
from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.options import check_int, check_number
from kvfold.pages import PAGE_SIZE, PageTable, Plane
from kvfold.rotation import Compact

CHANNELS = "channels"
"""What `Store` tells of each (row, KV head), (B, H, D): which channels of its keys stay."""
STEP = 4
"""Numbers of which the kernels take whole multiples."""


@dataclass(frozen=True)
class Thin(ByToken):
    """Keys without int(ratio * D) of their D channels, which are the same for all tokens of a (row, KV head).

    `Store` says which stay (`CHANNELS`), and that holds for as long as the row and head have a token here; where nobody
    says, it is those with the largest mean square in the first keys that come. Queries are brought to the same
    channels, so that ordinary attention reads the keys as they lie, under the scale of the whole head. A key's room is
    a multiple of 4 numbers: what is left of it holds zeros. Addressable token by token, exact to crop.
    """

    ratio: float = 0.4
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits()
    beside = CHANNELS

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0.0, 0.99)
        check_int("page_size", self.page_size, 1)

    def kept(self, size: int) -> int:
        """Channels that stay of `size`."""
        return size - int(self.ratio * size)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""
        room = min(spec.key_size, -(-self.kept(spec.key_size) // STEP) * STEP)
        sizes = {"keys": Plane(room, spec.dtype), "values": Plane(spec.value_size, spec.dtype)}
        return sizes | {POSITION: Plane(None, torch.int32)}

    def open(self, spec: Spec) -> "ThinSegment":
        table = open_table(self, spec, self.planes(spec), self.page_size)
        nobody = torch.zeros(spec.rows, spec.heads, spec.key_size, dtype=torch.bool, device=spec.device)
        return ThinSegment(table, spec.heads, spec.dtype, self, nobody)

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        super().check(spec, said, tensors, seen)
        channels, shape = tensors.get(CHANNELS), (spec.rows, spec.heads, spec.key_size)
        if channels is None or tuple(channels.shape) != shape or channels.dtype != torch.bool:
            raise ValueError(f"{CHANNELS} must be flags {shape} (B, H, D)")
        counts, held = channels.sum(-1).cpu().numpy(), said_counts(spec, said)
        if ((counts != self.kept(spec.key_size)) & ((counts > 0) | (held > 0))).any():
            raise ValueError(f"{CHANNELS} must mark {self.kept(spec.key_size)} channels of each row and head")

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "ThinSegment":
        segment: ThinSegment = super().restore(spec, said, tensors, twin)
        segment.channels = (twin.channels if isinstance(twin, ThinSegment) else tensors[CHANNELS]).to(spec.device)
        return segment


class ThinSegment(TokenSegment):
    """Some channels of the keys, all of the values. `channels` (B, H, D) marks those of each row and head, or none."""

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype, form: Thin, channels: Bool[Tensor, "B H D"]):
        super().__init__(table, heads, compute)
        self.form, self.channels = form, channels

    def bytes_beside(self, counted: set[int]) -> int:
        return super().bytes_beside(counted) + self.channels.nbytes

    def like(self, table: PageTable, rows: np.ndarray) -> "ThinSegment":
        return ThinSegment(table, self.heads, self.compute, self.form, self.channels[torch.from_numpy(rows)])

    def hear(self, told: Mapping[str, Tensor], which: Bool[Tensor, "B H"]) -> None:
        """Which channels stay, for the rows and heads of `which` that hold no token. ValueError for another number."""
        channels, kept = told.get(CHANNELS), self.form.kept(self.channels.shape[-1])
        empty = torch.from_numpy(self.counts() == 0).to(which.device)
        if channels is None:
            self.channels = self.channels & ~(which & empty)[..., None]  # who has no token begins anew
            return
        if bool((channels.sum(-1) != kept)[which].any()):
            raise ValueError(f"{CHANNELS}={channels.sum(-1).tolist()} must mark {kept} channels of each row and head")
        self.channels = torch.where((which & empty)[..., None], channels, self.channels)

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        first = chunk.valid.any(-1) & ~self.channels.any(-1)
        if bool(first.any()):
            self.hear({CHANNELS: self._largest(chunk)}, first)
        super().append(chunk, even=even)

    def _largest(self, chunk: Chunk) -> Bool[Tensor, "B H D"]:
        power = chunk.keys.float().masked_fill(~chunk.valid[..., None], 0.0).square().sum(2)
        kept = self.form.kept(power.shape[-1])
        return ops.top_mask(power, torch.full(power.shape[:2], kept, dtype=torch.int64, device=power.device))

    def thinned(self, states: Float[Tensor, "B H *N D"]) -> Float[Tensor, "B H *N W"]:
        """The channels of each row and head in their order, and zeros."""
        room = self.pool.planes["keys"].shape[-1]
        order = torch.argsort((~self.channels).byte(), dim=-1, stable=True)[..., :room]
        real, apart = self.channels.gather(-1, order), [1] * (states.dim() - 3)
        index = order.view(*order.shape[:2], *apart, room).expand(*states.shape[:-1], room)
        return states.gather(-1, index).masked_fill(~real.view(*real.shape[:2], *apart, room), 0.0)

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        return {what: self.thinned(states) if what == "keys" else states}

    def states(self, what: str) -> Tensor:
        return self._whole(what, 0, self.longest).to(self.compute)

    def _whole(self, what: str, start: int, stop: int) -> Float[Tensor, "B H T D"]:
        """With zeros in the channels that went."""
        plane = self.plane(what, start, stop)
        if what == "values":
            return plane
        places = (self.channels.cumsum(-1) - 1).clamp(min=0, max=plane.shape[-1] - 1)
        index = places[:, :, None].expand(-1, -1, plane.shape[2], -1)
        return plane.gather(-1, index).masked_fill(~self.channels[:, :, None], 0.0)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        mass = LOG_MASS if self.weighed else None
        if compact is None:
            return ops.attend_pages(
                self.thinned(q), self.table, scale, mass=mass, read=read, position=POSITION, weights=weights
            )

        def block(start: int, stop: int) -> Block:  # a rotation mixes channels, so that all of them must be there
            return Block(self._whole("keys", start, stop), self._whole("values", start, stop))

        width = self.pool.planes["values"].shape[-1]
        return attend_blocks(
            q, scale, self.valid(), width, block, self.column, mass=mass, read=read, compact=compact, weights=weights
        )

    def join(self, other: Any) -> None:
        if not isinstance(other, ThinSegment) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        super().join(other)
        self.channels = torch.cat([self.channels, other.channels])

    def clear(self) -> None:
        super().clear()
        self.channels = torch.zeros_like(self.channels)

    def same_pages(self, other: Any) -> bool:
        return super().same_pages(other) and torch.equal(self.channels, other.channels)

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        return said, tensors if of is not None else tensors | {CHANNELS: self.channels}
