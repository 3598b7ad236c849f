"""Answers of several parts as one: each over its own slots, joined by their log-sum-exp."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.index import Handed
from kvfold.formats.paged import one_each
from kvfold.formats.segment import Folding
from kvfold.formats.tokens import Chunk
from kvfold.ops.attend.blocked import Answer as Answer
from kvfold.rotation import Compact


@runtime_checkable
class Answering(Protocol):
    """What answers for some of the slots: a segment, or a piece of one."""

    @property
    def longest(self) -> int:
        """Slots of the longest row."""
        ...

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> Answer:  # fmt: skip
        """See `Segment.attend`."""
        ...


class Choosing(ABC):
    """What a generated token may read in part: a segment with an index."""

    @abstractmethod
    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """See `Segment.append`."""

    @abstractmethod
    def attend_few(
        self, q: Tensor, scale: float, *, weights: bool = False, handed: Handed | None = None
    ) -> Answer:  # fmt: skip
        """Over what is chosen for it; `handed`: what layers of this pass hand on to later ones, None: it is alone."""

    def step_few(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool, handed: Handed
    ) -> Answer:  # fmt: skip
        """`append` of one token to each row, and `attend_few`."""
        self.append(one_each(k, v, positions), even=True)
        return self.attend_few(q, scale, weights=weights, handed=handed)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool
    ) -> Answer:  # fmt: skip
        """See `Segment.step`; of a layer by itself."""
        return self.step_few(q, k, v, positions, scale, weights=weights, handed={})

    @property
    @abstractmethod
    def index_nbytes(self) -> int:
        """Bytes of what it chooses by."""


def answers(part: Answering) -> bool:
    """Whether a query gets anything of it."""
    return part.longest > 0 or (isinstance(part, Folding) and part.filled)


def attend_parts(
    parts: Sequence[Answering], q: Float[Tensor, "B H G Q D"], scale: float, read: Bool[Tensor, "B H T"] | None,
    compact: Compact | None, *, weights: bool, handed: Handed | None = None,
) -> Answer:  # fmt: skip
    """Over segments whose slots follow each other, as one; empty ones are not asked, but for the last of empty ones.

    `handed`: those that choose what a generated token reads do so, see `Choosing`; None: all is read.
    """
    found, start = list[Answer](), 0
    for part in parts:
        stop = start + part.longest
        if answers(part) or (part is parts[-1] and not found):
            if handed is not None and isinstance(part, Choosing):
                found.append(part.attend_few(q, scale, weights=weights, handed=handed))
            else:
                here = None if read is None else read[..., start:stop]
                turn = None if compact is None else compact.of(start, stop)
                found.append(part.attend(q, scale, read=here, compact=turn, weights=weights))
        start = stop
    return merged(found, weights=weights)


def merged(parts: Sequence[Answer], *, weights: bool, first: bool = False) -> Answer:
    """Partial answers over slots that follow each other as one; weights of all of them, None where one has none.

    `first`: weights of the first part's slots alone, in the softmax over all.
    """
    if len(parts) == 1:
        return parts[0]
    out, lse = ops.merge([part[:2] for part in parts])
    asked = parts[:1] if first else parts
    lefts = [part[2] for part in asked if part[2] is not None]
    if not weights or len(lefts) < len(asked):
        return out, lse, None
    shares = [torch.exp(own - lse).nan_to_num(0.0)[..., None] for _, own, _ in asked]
    return out, lse, torch.cat([left * share for left, share in zip(lefts, shares, strict=True)], -1)
