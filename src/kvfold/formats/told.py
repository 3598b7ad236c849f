"""Numbers of each (row, head) that a segment is told beside its tokens: the first ones count, for good."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats.by_token import ByToken, TokenSegment
from kvfold.formats.segment import Segment, Spec
from kvfold.formats.tokens import Chunk


class Telling(ByToken):
    """A format whose segments are told numbers, which a state has under the name `beside`."""

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> Any:
        """See `Format.restore`."""
        segment = super().restore(spec, said, tensors, twin)
        assert self.beside is not None
        segment.told = twin.told if isinstance(twin, Told) else tensors[self.beside].to(spec.device)
        return segment


class Told(TokenSegment):
    """Tokens, and beside them what was told of each (row, head), 0 where nobody told anything."""

    name: ClassVar[str]
    """By which it is told, and what a state calls it."""
    told: Float[Tensor, "B H W"]

    @property
    @abstractmethod
    def settled(self) -> Float[Tensor, "B H W"]:
        """What counts, where nobody told anything too."""

    def hear(self, told: Mapping[str, Tensor], which: Bool[Tensor, "B H"]) -> None:
        """What is told of each (row, head) of `which` that has nothing yet."""
        self.told = first_told(self.name, self.told, told, which, self.counts())

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        super().append(chunk, even=even)
        # Codes are there that were made without it: nobody may tell anything else any more.
        self.told = torch.where(chunk.valid.any(-1)[..., None], self.settled, self.told)

    def bytes_beside(self, counted: set[int]) -> int:
        fresh = id(self.told) not in counted  # a twin has the same
        counted.add(id(self.told))
        return super().bytes_beside(counted) + fresh * self.told.nbytes

    def join(self, other: Any) -> None:
        super().join(other)
        self.told = torch.cat([self.told, other.told])

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        return said, tensors if of is not None else tensors | {self.name: self.told.contiguous()}

    def same_pages(self, other: Any) -> bool:
        return isinstance(other, type(self)) and torch.equal(self.told, other.told) and super().same_pages(other)

    def clear(self) -> None:
        self.drop_tokens()
        self.told = torch.zeros_like(self.told)

    def drop_tokens(self) -> None:
        """Drop the tokens, but not what is remembered of the text."""
        super().clear()


def first_told(
    name: str, held: Float[Tensor, "B H D"], told: Mapping[str, Tensor], which: Bool[Tensor, "B H"],
    counts: np.ndarray,
) -> Float[Tensor, "B H D"]:  # fmt: skip
    """What is held, and what is `told` by `name` of the rows and heads of `which` where that is nothing yet (zeros).

    A row and head without a token, `counts` (B, H), begins anew: what it was told goes with the last one.

    Raises ValueError where something else is told.
    """
    empty = torch.from_numpy(counts == 0).to(held.device)
    held = held.masked_fill((empty & which.to(held.device))[..., None], 0.0)
    if not told:
        return held
    strange = sorted(told.keys() - {name})
    if strange:
        raise ValueError(f"told={strange} must be {name!r}")
    new = told[name].to(held)
    return torch.where((held == 0).all(-1, keepdim=True) & which[..., None].to(held.device), new, held)


def settled(held: Float[Tensor, "B H D"]) -> Float[Tensor, "B H D"]:
    """What counts: 1 where nobody has told anything."""
    return held.masked_fill(held == 0, 1.0)


def check_told(name: str, held: Tensor | None, shape: tuple[int, ...], signed: bool = False) -> None:
    """Raise ValueError unless these are such numbers, float32 (B, H, D), finite, and no less than 0 unless `signed`."""
    if held is None or tuple(held.shape) != shape or held.dtype != torch.float32:
        found = None if held is None else (tuple(held.shape), held.dtype)
        raise ValueError(f"{name}={found} must be {(shape, torch.float32)} (shape, dtype)")
    if not bool((held.isfinite() & (signed | (held >= 0))).all()):
        raise ValueError(f"{name} must be finite{'' if signed else ' and no less than 0'}")
