"""What segments on pages have in common, whatever their planes mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from kvfold.formats.segment import Spec, Uncaptured
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk, LateChunk
from kvfold.pages import PagePool, PageTable, Plane
from kvfold.rotation import Compact

S = TypeVar("S", bound="PagedSegment")
MOST_ROOM = 64
"""Times the tokens of a file that its pages may have room for; a page of so many is always allowed."""


class PagedSegment(Uncaptured, ABC):
    """Tokens on pages, one row of the page table for each (sequence, KV head)."""

    codes: tuple[str, ...] = ("keys", "values")
    """Planes that are no columns."""
    listed: bool = False
    """Whether nothing but its pages belongs to a (row, head): then some pages are a row as good as any (`few`)."""
    singled: bool = False
    """Whether tokens are read one by one too, as pages of one token each."""

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype):
        self.table, self.heads, self.compute = table, heads, compute

    @abstractmethod
    def states(self, what: str) -> Tensor:
        """All "keys" or "values", (B, H, T, D), as the model computes in."""

    @abstractmethod
    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """See `Segment.attend`."""

    def own(self, name: str) -> str:
        """The plane of a column."""
        return name

    def names(self) -> dict[str, str]:
        """The columns, and their planes."""
        return {name: name for name in self.table.pool.planes if name not in self.codes}

    def like(self: S, table: PageTable, rows: np.ndarray) -> S:
        """A segment over the table of some of our sequences."""
        return type(self)(table, self.heads, self.compute)

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def pool(self) -> PagePool:
        return self.table.pool

    @property
    def nbytes(self) -> int:
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        return self.table.bytes_beside(counted)

    def nbytes_with(self, more: np.ndarray) -> int:
        """See `Segment.nbytes_with`."""
        rows, width = self.table.table.shape
        wider = max(0, int((-(-(self.table.lengths + more.reshape(-1)) // self.pool.page_size)).max(initial=0)) - width)
        fresh = self.table.pages_for(more.reshape(-1))
        total: int = self.nbytes + fresh * self.pool.page_nbytes + wider * rows * self.table.table.itemsize
        return total

    def row_nbytes(self) -> np.ndarray:
        pages: np.ndarray = (self.table.table >= 0).reshape(self.batch, -1).sum(1)
        return pages * self.pool.page_nbytes

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        """Pages that must be free for `more[b, h]` more tokens, for `Arena.check`."""
        return {self.pool: self.table.pages_for(more.reshape(-1))}

    @property
    def batch(self) -> int:
        return self.table.rows // self.heads

    @property
    def longest(self) -> int:
        return self.table.longest

    def counts(self) -> np.ndarray:
        return self.table.counts.reshape(-1, self.heads)

    def lengths(self) -> np.ndarray:
        return self.table.lengths.reshape(-1, self.heads).copy()

    # -- tokens ------------------------------------------------------------------------------------------------

    def _rows(self, plane: Tensor) -> Tensor:
        return plane.reshape(self.batch, self.heads, *plane.shape[1:])

    def plane(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """What a plane holds, (B, H, T, ...)."""
        return self._rows(self.table.dense(name, start, stop))

    def column(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A column, (B, H, T)."""
        return self.plane(self.own(name), start, stop)

    @property
    def weighed(self) -> bool:
        """Whether tokens have a mass."""
        return self.own(LOG_MASS) in self.table.pool.planes

    def valid(self) -> Bool[Tensor, "B H T"]:
        """Which slots are tokens."""
        return self._rows(self.table.valid())

    def columns(self) -> tuple[Bool[Tensor, "B H T"], Mapping[str, Tensor]]:
        table = self.table
        shape = (table.rows // self.heads, self.heads, table.longest)
        names = {name: table.dense(plane).reshape(shape) for name, plane in self.names().items()}
        return table.valid().view(shape), names

    def dense(self) -> Chunk:
        valid, columns = self.columns()
        return LateChunk(lambda: self.states("keys"), lambda: self.states("values"), valid, columns)

    def add_columns(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make planes for columns that have none yet; the columns by the names of their planes."""
        mine, pool = {}, self.table.pool
        for name, column in columns.items():
            plane = self.own(name)
            mine[plane] = column
            if plane not in pool.specs:
                pool.add_plane(plane, Plane(None, column.dtype))
        return mine

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        self.table.cut(counts.reshape(-1))
        self.table.trim(slack=slack)

    def cropped(self, limit: np.ndarray) -> None:
        return  # nothing is remembered beside the tokens

    # -- rows and pages ----------------------------------------------------------------------------------------

    def select(self: S, rows: np.ndarray) -> S:
        wide = (np.asarray(rows)[:, None] * self.heads + np.arange(self.heads)).reshape(-1)
        return self.like(self.table.select(wide), np.asarray(rows))

    def join(self, other: Any) -> None:
        """Raises ValueError where it is no segment of the same format and sizes."""
        mine, theirs = ((type(x).__name__, getattr(x, "heads", 0), getattr(x, "compute", None)) for x in (self, other))
        if mine != theirs:
            raise ValueError(f"other={theirs} (format, heads, dtype) must be {mine}, as this segment is")
        self.table.join(other.table)

    def clear(self) -> None:
        # To a pool of our own: in the one that a fork shares, our next tokens would lie in the other's memory for good.
        self.table.restart()

    def drop_tokens(self) -> None:
        self.clear()

    def compact(self) -> None:
        self.table.compact()

    def replayed(self) -> None:
        self.table.step()

    @property
    def shared(self) -> bool:
        return self.table.shared

    def same_pages(self, other: Any) -> bool:
        return isinstance(other, PagedSegment) and self.longest > 0 and self.table.same_pages(other.table)

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"counts": self.counts().tolist()}, {} if of is not None else self.table.flat()


def one_each(k: Tensor, v: Tensor, positions: Tensor) -> Chunk:
    """One token for each row, (B, H, 1, D) at text positions (B, 1)."""
    wide = positions[:, None].expand(-1, k.shape[1], -1)
    return Chunk(k, v, torch.ones_like(wide, dtype=torch.bool), {POSITION: wide})


def open_table(form: Any, spec: Spec, planes: Mapping[str, Plane], page_size: int, **options: Any) -> PageTable:
    """An empty table for a segment of `form`: over a pool of its own, or over the arena's for such segments.

    Where the pool lies in a fast memory pages keep their places while rows grow: nothing is copied on a disk.
    """
    if spec.memory is not None:
        pool = PagePool(planes, spec.device, page_size, memory=spec.memory)
        options["scattered"] = True
    elif spec.arena is None:
        pool = PagePool(planes, spec.device, page_size)
    else:
        key = (spec.layer, form, page_size, spec.key_size, spec.value_size, spec.dtype, spec.device)
        pool = spec.arena.pool(key, planes, spec.device, page_size)
    return PageTable(pool, spec.rows * spec.heads, **options)


def said_counts(spec: Spec, said: Mapping[str, Any], name: str = "counts") -> np.ndarray:
    """Tokens of each row as a state tells them, (B, H). Raises ValueError where they are not that."""
    try:
        counts = np.array(said.get(name), dtype=object).reshape(spec.rows, spec.heads)
        ints = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts.flat)
    except ValueError:
        ints = False
    if not ints:
        raise ValueError(f"{name}={said.get(name)!r} must be {spec.rows} x {spec.heads} ints >= 0")
    return counts.astype(np.int64)


def check_tensors(
    tensors: Mapping[str, Tensor], planes: Mapping[str, Plane], counts: np.ndarray, page_size: int = 1
) -> None:
    """Raise ValueError unless there is a tensor of so many tokens for each plane, and all others are columns."""
    tokens, pages = int(counts.sum()), int((-(-counts // page_size)).sum())
    for name in (*planes, *sorted(tensors.keys() - planes.keys())):
        found, spec = tensors.get(name), planes.get(name)
        total = pages if spec is not None and spec.per_page else tokens
        shape = (total,) if spec is None or spec.width is None else (total, spec.width)
        if found is None or tuple(found.shape) != shape or (spec is not None and found.dtype != spec.dtype):
            held = None if found is None else (tuple(found.shape), found.dtype)
            raise ValueError(f"{name}={held} must be {(shape, None if spec is None else spec.dtype)} (shape, dtype)")


def check_room(counts: np.ndarray, page_size: int) -> None:
    """Raise ValueError where pages are so large that they would take far more memory than their tokens do in a file."""
    tokens, pages = int(counts.sum()), int((-(-counts // page_size)).sum())
    if pages * page_size > MOST_ROOM * tokens:
        raise ValueError(f"page_size={page_size}, so {pages} pages with room for {MOST_ROOM} times the {tokens} tokens")


def check_positions(counts: np.ndarray, positions: Tensor, seen: np.ndarray | None) -> None:
    """Raise ValueError unless the positions (N,) of counts[b, h] tokens lie within what each row has read, (B,)."""
    limit = torch.iinfo(torch.int32).max if seen is None else torch.from_numpy(np.repeat(seen, counts.sum(1)))
    wrong = (positions < 0) | (positions >= limit)
    if bool(wrong.any()):
        raise ValueError(f"{POSITION}={int(positions[wrong][0])} of a token, which its row has not read")


def of_tokens(tensors: Mapping[str, Tensor], beside: str | None) -> dict[str, Tensor]:
    """What a state has of tokens: all but what it holds under the name `beside`."""
    return {name: tensor for name, tensor in tensors.items() if name != beside}


def check_paged(
    planes: Mapping[str, Plane], page_size: int, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor],
    seen: np.ndarray | None,
) -> None:  # fmt: skip
    """`Format.check` of what `PagedSegment.state` gave: all its tokens on pages of one size."""
    counts = said_counts(spec, said)
    check_tensors(tensors, planes, counts)
    check_room(counts, page_size)
    check_positions(counts, tensors[POSITION], seen)


def restored(
    opened: Callable[[], S], spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Any
) -> S:
    """What `PagedSegment.state` gave and `Format.check` has looked at, in a segment that is opened now."""
    counts = said_counts(spec, said)
    if twin is not None:
        if not isinstance(twin, PagedSegment) or not np.array_equal(twin.counts(), counts):
            raise ValueError(f"counts={said['counts']} must be those of the segment that holds the same pages")
        segment = opened()
        segment.table = twin.table.fork()
        return segment
    return refilled(opened(), counts, tensors)


def refilled(segment: S, counts: np.ndarray, tensors: Mapping[str, Tensor]) -> S:
    """An empty segment with the tokens of a state that has been looked at."""
    for name, plane in tensors.items():
        segment.pool.add_plane(name, Plane(None, plane.dtype))
    segment.table.add(counts.reshape(-1), {name: plane.to(segment.pool.device) for name, plane in tensors.items()})
    return segment
