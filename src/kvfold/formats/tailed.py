"""Formats and segments in two parts: tokens in codes, and behind them the newest as they are."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.dense import Dense, DenseSegment
from kvfold.formats.flat import Flat
from kvfold.formats.paged import (
    PagedSegment,
    check_positions,
    check_tensors,
    of_tokens,
    one_each,
    open_table,
    refilled,
    said_counts,
)
from kvfold.formats.parts import attend_parts
from kvfold.formats.segment import Segment, Spec, Uncaptured
from kvfold.formats.tokens import POSITION, Chunk, join
from kvfold.options import shown
from kvfold.pages import PAGE_SIZE, PagePool, PageTable, Plane
from kvfold.pages.rows import spans
from kvfold.rotation import Compact

C = TypeVar("C", bound=PagedSegment)
T = TypeVar("T", bound="TailedSegment[Any]")


class Tailed(ABC):
    """A format of two parts: as soon as a (row, head) has `residual + group` tokens in the tail, the oldest `group` of
    them leave it, and are coded: once, so that streaming gives what one shot gives.
    """

    group: int
    """Tokens that leave the tail together."""
    residual: int
    """Tokens that stay in it, at least."""
    beside: ClassVar[str | None] = None
    """What a state calls the tensor that is of no token."""
    whole: bool
    """Whether tokens are coded a page of `group` at a time, and so lie."""

    @abstractmethod
    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What the first part holds from the start."""

    @abstractmethod
    def open(self, spec: Spec) -> "TailedSegment[Any]":
        """An empty segment."""

    @property
    def newest(self) -> Dense:
        """The format of the tail: so many tokens a page that a group is whole pages."""
        return Dense(page_size=math.gcd(self.group, PAGE_SIZE))

    def open_tail(self, spec: Spec) -> DenseSegment:
        """An empty tail."""
        newest = self.newest
        table = open_table(newest, spec, newest.planes(spec), newest.page_size, scattered=True)
        return DenseSegment(table, spec.heads, spec.dtype)

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """See `Format.check`."""
        counts, coded = self._counts(spec, said)
        parts = _parts(of_tokens(tensors, self.beside))
        check_tensors(parts[0], self.planes(spec), coded, self.group if self.whole else 1)
        check_tensors(parts[1], self.newest.planes(spec), counts - coded)
        for part, some in zip(parts, (coded, counts - coded), strict=True):
            check_positions(some, part[POSITION], seen)

    def _counts(self, spec: Spec, said: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each row, and how many of them are coded, (B, H). ValueError where that can't be."""
        counts, coded = said_counts(spec, said), said_counts(spec, said, "coded")
        if (coded > counts).any() or (self.whole and (coded % self.group).any()):
            rule = f"multiples of group={self.group}, " if self.whole else ""
            raise ValueError(f"coded={shown(said['coded'])} must be {rule}at most counts={shown(said['counts'])}")
        return counts, coded

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "TailedSegment[Any]":
        """See `Format.restore`."""
        counts, coded = self._counts(spec, said)
        if twin is not None:
            wanted = [counts, coded]
            if isinstance(twin, TailedSegment) and np.array_equal([twin.counts(), twin.coded.counts()], wanted):
                return twin.select(np.arange(spec.rows))
            raise ValueError(f"counts={said['counts']} must be those of the segment that holds the same pages")
        self.check(spec, said, tensors)
        parts, segment = _parts(of_tokens(tensors, self.beside)), self.open(spec)
        refilled(segment.coded, coded, parts[0])
        refilled(segment.tail, counts - coded, parts[1])
        return segment


def _parts(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What a state has of codes and of the tail. ValueError for what is of neither."""
    strange = sorted(name for name in tensors if name.partition(".")[0] not in ("coded", "tail"))
    if strange:
        raise ValueError(f"tensors: {strange[0]!r} must begin with 'coded.' or 'tail.'")
    return [{n.removeprefix(p): x for n, x in tensors.items() if n.startswith(p)} for p in ("coded.", "tail.")]


class TailedSegment(Uncaptured, ABC, Generic[C]):
    """Slots are those of the longest coded row, then those of the longest tail. See `Tailed`."""

    def __init__(self, form: Any, coded: C, tail: DenseSegment):
        self.form, self.coded, self.tail = form, coded, tail

    def like(self: T, coded: C, tail: DenseSegment) -> T:
        """A segment over other parts."""
        return type(self)(self.form, coded, tail)

    @abstractmethod
    def _leave(self, tokens: Flat) -> None:
        """Tokens in the model's numbers are coded."""

    @abstractmethod
    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """See `Segment.keep`."""

    @abstractmethod
    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """See `Segment.amend`."""

    @abstractmethod
    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """See `Segment.truncate`."""

    @property
    def parts(self) -> tuple[PagedSegment, ...]:
        return self.coded, self.tail

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        return sum(part.bytes_beside(counted) for part in self.parts)

    def nbytes_with(self, more: np.ndarray) -> int:
        """See `Segment.nbytes_with`; what is in the tail stays there, but for what it would give away anyhow."""
        moved = self._moved(more)
        return self.coded.nbytes_with(moved) + self.tail.nbytes_with(np.maximum(more - moved, 0))

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

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        """Pages that must be free for `more[b, h]` more tokens, for `Arena.check`."""
        moved = self._moved(more)
        beyond = np.maximum(moved - self.tail.counts(), 0)
        # A row that is coded beyond its tail begins a page where it had a part of one.
        tail = self.tail.table.pages_for((more - beyond).reshape(-1)) + int((beyond > 0).sum())
        if self.tail.table.holed and self.tail.shared:  # holes are closed first, on pages of its own
            tail += int(self.tail.table.needed.sum()) + self.tail.table.rows
        return {self.coded.pool: self.coded.table.pages_for(moved.reshape(-1)), self.tail.pool: tail}

    # -- tokens ------------------------------------------------------------------------------------------------

    def _moved(self, more: np.ndarray) -> np.ndarray:
        """Tokens that are coded when so many more come, (B, H)."""
        over = self.tail.counts() + more - self.form.residual
        moved: np.ndarray = np.maximum(over // self.form.group, 0) * self.form.group
        return moved

    def _front(self, counts: np.ndarray) -> Flat:
        """The first so many tokens of each row's tail, which then has no holes."""
        self.tail.close()
        rows, slots = spans(np.zeros(counts.size, dtype=np.int64), counts.reshape(-1))
        return Flat(counts.reshape(-1), self.tail.table.read(self.tail.pool.planes, rows, slots))

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """See `Segment.append`."""
        for part in self.parts:
            part.add_columns(chunk.columns)
        more = np.full(self.counts().shape, chunk.valid.shape[-1]) if even else chunk.valid.sum(-1).cpu().numpy()
        moved = self._moved(more)
        if not moved.any():
            self.tail.append(chunk, even=even)
            return
        old = self._front(np.minimum(moved, self.tail.counts()))
        self.ask(self.pages_for(more))
        beyond = moved - old.counts.reshape(moved.shape)
        now = chunk.valid & (chunk.valid.cumsum(-1) <= torch.from_numpy(beyond).to(chunk.valid.device)[..., None])
        states = {"keys": chunk.keys[now].to(self.tail.compute), "values": chunk.values[now].to(self.tail.compute)}
        new = Flat(beyond.reshape(-1), states | {name: column[now] for name, column in chunk.columns.items()})
        self._leave(old.then(new))
        first = np.arange(self.tail.table.table.shape[1]) * self.tail.pool.page_size
        self.tail.table.drop_pages(first < old.counts[:, None])
        self.tail.append(chunk.but(chunk.valid & ~now))

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
        if not isinstance(other, type(self)) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        tables = zip(self.tables(), other.tables(), strict=True)
        self.ask({x.pool: 0 if x.pool is y.pool else len(np.unique(y.held)) for x, y in tables})
        for part, more in zip(self.parts, other.parts, strict=True):
            part.join(more)

    def tables(self) -> list[PageTable]:
        """All that tokens lie on."""
        return [part.table for part in self.parts]

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
