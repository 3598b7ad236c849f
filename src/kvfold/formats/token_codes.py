"""Segments of tokens in codes, each with scales of its own: any may be dropped, written over or read alone."""

from abc import abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.by_token import TokenSegment
from kvfold.formats.segment import Spec
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.ops.attend import blocked
from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.codes.packing import width
from kvfold.ops.tokens import Coding
from kvfold.ops.tokens.naive import KINDS, decoded
from kvfold.pages import PageTable, Plane
from kvfold.rotation import Compact


def token_planes(keys: Coding, values: Coding, scale: torch.dtype) -> dict[str, Plane]:
    """What pages hold from the start: codes, and by token scales and, of codings without levels, zeros."""
    planes = {}
    for what, coding in (("keys", keys), ("values", values)):
        planes[what] = Plane(width(coding.size, coding.bits), torch.uint8)
        planes[f"{KINDS[what]}_scale"] = Plane(coding.groups, scale)
        if coding.levels is None:
            planes[f"{KINDS[what]}_zero"] = Plane(coding.groups, scale)
    return planes | {POSITION: Plane(None, torch.int32)}


class CodedTokens(TokenSegment):
    """A format says how numbers become codes, and in which frame: what is done to queries before, to outputs after."""

    codes = ("keys", "key_scale", "key_zero", "values", "value_scale", "value_zero")

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype, keys: Coding, values: Coding):
        super().__init__(table, heads, compute)
        self.coding = {"keys": keys, "values": values}

    @abstractmethod
    def coded(self, what: str, states: Float[Tensor, "*N T D"]) -> dict[str, Tensor]:
        """What planes hold of some "keys" or "values": of each token the same, whatever comes with it."""

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        step = _at_once(states.shape[:-2].numel() * states.shape[-1])
        parts = [self.coded(what, some) for some in torch.split(states, step, -2)]
        return parts[0] if len(parts) == 1 else {name: torch.cat([x[name] for x in parts], -2) for name in parts[0]}

    @abstractmethod
    def asked(self, q: Float[Tensor, "B H G Q D"]) -> Float[Tensor, "B H G Q D"]:
        """Queries in the frame of the codes of keys, float32."""

    @abstractmethod
    def back(self, what: str, states: Tensor) -> Tensor:
        """ "keys" or "values" (B, H, ..., D) that lie in the frame of their codes, as the model has them."""

    def numbers(self, what: str, start: int = 0, stop: int | None = None) -> Float[Tensor, "B H T _"]:
        """Keys or values of some slots as the model has them, but for rounding, float32."""
        names = [what, f"{KINDS[what]}_scale", f"{KINDS[what]}_zero"]
        planes = (self.plane(name, start, stop) for name in names if name in self.pool.specs)
        return self.back(what, decoded(self.coding[what], *planes))

    def states(self, what: str) -> Tensor:
        most = torch.finfo(self.compute).max  # which a sum of rounded numbers may exceed
        step = _at_once(self.table.rows * self.coding[what].size)
        ends = [*range(0, max(1, self.longest), step), self.longest]
        parts = [self.numbers(what, *ends[i : i + 2]).clamp(-most, most).to(self.compute) for i in range(len(ends) - 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Over the codes as they are stored; where keys are to be turned, over what they stand for, block by block."""
        mass = LOG_MASS if self.weighed else None
        if compact is None:
            out, lse, left = ops.attend_tokens(
                self.asked(q), self.table, scale, **self.coding, mass=mass, read=read, weights=weights
            )
            return self.back("values", out).to(q.dtype), lse, left

        def block(start: int, stop: int) -> Block:
            return Block(*(self.numbers(what, start, stop) for what in ("keys", "values")))

        return attend_blocks(
            q, scale, self.valid(), self.coding["values"].size, block, self.column, mass=mass, read=read,
            compact=compact, weights=weights,
        )  # fmt: skip


def _at_once(numbers: int) -> int:
    """Tokens of so many numbers that are worked out at once."""
    return max(1, blocked.BLOCK_ELEMENTS // max(1, numbers))


def scale_dtype(spec: Spec, narrow: torch.dtype) -> torch.dtype:
    """What scales are held in: as wide as the model's own numbers, `narrow` where those have two bytes."""
    return narrow if spec.dtype.itemsize == 2 else torch.float32
