"""Segments in two parts: pages of codes, and behind them the newest tokens as they are."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.dense import DenseSegment
from kvfold.formats.paged import PagedSegment, one_each
from kvfold.formats.parts import attend_parts
from kvfold.formats.tokens import Chunk, join
from kvfold.pages import PagePool
from kvfold.rotation import Compact

C = TypeVar("C", bound=PagedSegment)
T = TypeVar("T", bound="TailedSegment[Any]")


class TailedSegment(ABC, Generic[C]):
    """Slots are those of the longest coded row, then those of the longest tail. A format says how tokens get there."""

    def __init__(self, coded: C, tail: DenseSegment):
        self.coded, self.tail = coded, tail

    @abstractmethod
    def like(self: T, coded: C, tail: DenseSegment) -> T:
        """A segment over other parts."""

    @abstractmethod
    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """See `Segment.append`."""

    @abstractmethod
    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """See `Segment.keep`."""

    @abstractmethod
    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """See `Segment.amend`."""

    @abstractmethod
    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """See `Segment.truncate`."""

    @abstractmethod
    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        """Pages that must be free for `more[b, h]` more tokens, for `Arena.check`."""

    @property
    def parts(self) -> tuple[PagedSegment, ...]:
        return self.coded, self.tail

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        return sum(part.bytes_beside(counted) for part in self.parts)

    def row_nbytes(self) -> np.ndarray:
        sizes: np.ndarray = self.coded.row_nbytes() + self.tail.row_nbytes()
        return sizes

    @property
    def longest(self) -> int:
        return self.coded.longest + self.tail.longest

    def counts(self) -> np.ndarray:
        counts: np.ndarray = self.coded.counts() + self.tail.counts()
        return counts

    def lengths(self) -> np.ndarray:
        tail = self.tail.lengths()
        return np.where(tail > 0, self.coded.longest + tail, self.coded.lengths())

    def ask(self, pages: Mapping[PagePool, int]) -> None:
        """Raise OutOfPages where an arena has no room for them: before the first of several steps is made."""
        if self.tail.pool.arena is not None:
            self.tail.pool.arena.check(pages)

    # -- tokens ------------------------------------------------------------------------------------------------

    def columns(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        tokens = self.dense()
        return tokens.valid, tokens.columns

    def dense(self) -> Chunk:
        return join([part.dense() for part in self.parts])

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """One softmax over both."""
        if compact is not None and compact.slots is None:
            compact = replace(compact, slots=torch.cat([part.valid() for part in self.parts], -1).cumsum(-1) - 1)
        return attend_parts(self.parts, q, scale, read, compact, weights=weights)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.append(one_each(k, v, positions), even=True)
        return self.attend(q, scale, weights=weights)

    # -- rows and pages ----------------------------------------------------------------------------------------

    def select(self: T, rows: np.ndarray) -> T:
        return self.like(self.coded.select(rows), self.tail.select(rows))

    def join(self, other: Any) -> None:
        """Raises ValueError where it is no segment of the same format and sizes."""
        if not isinstance(other, TailedSegment):
            raise ValueError(f"other={type(other).__name__} must be a {type(self).__name__}")
        pairs = list(zip(self.parts, other.parts, strict=True))
        self.ask({x.pool: 0 if x.pool is y.pool else len(np.unique(y.table.held)) for x, y in pairs})
        for part, more in pairs:
            part.join(more)

    def tell(self, told: Mapping[str, Tensor]) -> None:
        raise ValueError(f"told={sorted(told)}: {type(self).__name__} keeps nothing beside tokens")

    def cropped(self, limit: np.ndarray) -> None:
        return  # nothing is remembered beside the tokens

    def clear(self) -> None:
        for part in self.parts:
            part.clear()

    def drop_tokens(self) -> None:
        self.clear()

    def compact(self) -> None:
        for part in self.parts:
            part.compact()

    def reserve(self) -> list[Tensor]:
        raise NotImplementedError(f"{type(self).__name__}: the traits of its format say graphs=False")

    def replayed(self) -> None:
        self.reserve()

    @property
    def shared(self) -> bool:
        return any(part.shared for part in self.parts)

    def same_pages(self, other: Any) -> bool:
        both = isinstance(other, TailedSegment) and self.longest > 0
        return both and all(x.table.same_pages(y.table) for x, y in zip(self.parts, other.parts, strict=True))

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Closes holes first, so that what is read back lies as this does."""
        states = {name: part.state(of=of) for name, part in (("coded", self.coded), ("tail", self.tail))}
        said = {"counts": self.counts().tolist(), "coded": self.coded.counts().tolist()}
        return said, {f"{p}.{name}": x for p, (_, tensors) in states.items() for name, x in tensors.items()}
