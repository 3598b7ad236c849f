"""The pool: fixed-size blocks of tokens, who holds them, and the tensors that they are rows of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from kvfold.pages.memory import blank
from kvfold.pages.runs import RUN_BYTES, laid, place

PAGE_SIZE = 16
"""Tokens per page: the last page of a row is half empty on average, 8 tokens of each (row, head)."""
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what the CPU kernels read a dtype that NumPy lacks."""
ALLOWED = 4
"""Pages that are copied, at most, for each one that was handed out, so that rows in an arena lie in runs."""


@dataclass(frozen=True)
class Plane:
    """What a pool stores for each token: `width` numbers (None: one scalar), `fill` where nobody says.

    `per_page`: for each page, as the scales of a group of tokens.
    """

    width: int | None
    dtype: torch.dtype
    fill: float = 0.0
    per_page: bool = False

    def shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """(N, P, W), without P where `per_page` and without W where it is a scalar."""
        return (pages, *(() if self.per_page else (page_size,)), *(() if self.width is None else (self.width,)))

    def page_nbytes(self, page_size: int) -> int:
        """Bytes of one page."""
        tokens, width = 1 if self.per_page else page_size, 1 if self.width is None else self.width
        return tokens * width * self.dtype.itemsize


@runtime_checkable
class Limit(Protocol):
    """Who says how far pools may grow."""

    def check(self, requests: "Mapping[PagePool, int]") -> None:
        """Raise unless every pool can hand out so many pages; then they lie free in it."""
        ...

    def reserve(self, pages: int, nbytes: int) -> None:
        """Raise unless so many more bytes may be allocated."""
        ...


@runtime_checkable
class Holder(Protocol):
    """A table of pages, (R, M), -1 where a row has none."""

    table: np.ndarray


class PagePool:
    """The storage of one segment: N pages of P tokens in each plane, and their reference counts.

    With an `arena` it is that of many. `moved_nbytes` counts what was copied from page to page so that rows lie in runs
    and nothing is held in vain; a pool that takes another one's place goes on counting.
    """

    def __init__(
        self, planes: Mapping[str, Plane], device: torch.device, page_size: int = PAGE_SIZE, arena: Limit | None = None
    ):
        self.specs = dict(planes)
        self.per_page = any(spec.per_page for spec in planes.values())  # whether some plane has one entry for a page
        self.page_size = page_size
        self.device = device
        self.arena = arena
        self.planes = {name: self._made(spec, 0) for name, spec in self.specs.items()}
        self.refs = np.zeros(0, dtype=np.int32)
        self.used = 0  # pages that somebody holds
        self.shared = 0  # pages with more than one reference
        self.moved_nbytes = 0
        self._scraps = 0  # pages handed out as the rest of others' blocks, since rows were laid in runs
        self._allowance = 0  # pages that may be copied to lay rows in runs: see ALLOWED
        self.tables: WeakValueDictionary[int, Holder] = WeakValueDictionary()  # who may hold pages, by id
        self._arrays: dict[str, tuple[Tensor, np.ndarray]] = {}

    def array(self, name: str) -> np.ndarray:
        """A plane as the CPU kernels see it, (N * P, W) and no copy; bfloat16 as uint16, float16 as int16."""
        plane = self.planes[name]
        known = self._arrays.get(name)
        if known is None or known[0] is not plane:
            bits = BITS.get(plane.dtype, plane.dtype)
            known = plane, plane.view(bits).view(-1, self.specs[name].width or 1).numpy()
            self._arrays[name] = known
        return known[1]

    def _made(self, spec: Plane, pages: int, known: Tensor | None = None) -> Tensor:
        """A plane of so many pages, the first of them as they are `known`."""
        # Never read before it is written: lengths bound every read. Filled all the same, because the slack
        # of a page takes part (masked) in dense reads and NaN times zero is NaN.
        made = blank(spec.shape(pages, self.page_size), spec.dtype, self.device)
        first = 0 if known is None else min(pages, len(known))
        if known is not None:
            made[:first] = known[:first]
        made[first:] = spec.fill
        return made

    @property
    def pages(self) -> int:
        """Pages allocated, used or free."""
        return len(self.refs)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self.refs) - self.used

    @property
    def run(self) -> int:
        """Pages of a run that is long enough, by the widest plane."""
        widest = max((spec.page_nbytes(self.page_size) for spec in self.specs.values()), default=RUN_BYTES)
        return -(-RUN_BYTES // max(1, widest))

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page in every plane, and of its reference count."""
        return sum(spec.page_nbytes(self.page_size) for spec in self.specs.values()) + self.refs.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of every plane and of the reference counts."""
        return sum(plane.nbytes for plane in self.planes.values()) + self.refs.nbytes

    def add_plane(self, name: str, spec: Plane) -> None:
        """A new column beside the others; tokens already stored get its fill value."""
        if name not in self.specs:
            if self.arena is not None:
                self.arena.reserve(self.pages, self.pages * spec.page_nbytes(self.page_size))
            self.specs[name] = spec
            self.planes[name] = self._made(spec, self.pages)
            self.per_page |= spec.per_page

    def grow(self, pages: int) -> None:
        """Add free pages; page numbers stay valid."""
        if self.arena is not None:
            self.arena.reserve(pages, pages * self.page_nbytes)
        if self.arena is not None and self.lay(self.pages + pages):
            return
        self._arrays.clear()  # they would hold the old planes
        for name, spec in self.specs.items():
            self.planes[name] = self._made(spec, self.pages + pages, self.planes[name])
        self.refs = np.concatenate([self.refs, np.zeros(pages, dtype=np.int32)])

    def lay(self, pages: int) -> bool:
        """Lay the rows of all tables in runs, in a pool of so many pages; page numbers change.

        False, and nothing is done, where somebody holds pages who is no table.
        """
        tables = list(self.tables.values())
        rows = [row[row >= 0] for table in tables for row in table.table]
        if not rows or not np.array_equal(np.bincount(np.concatenate(rows), minlength=self.pages), self.refs):
            return False
        old, new = laid(rows, self.run, pages)
        self._arrays.clear()
        for name, spec in self.specs.items():
            made = self._made(spec, pages)
            copy_pages(made, new, self.planes[name], old)
            self.planes[name] = made
        self.moved_nbytes += len(old) * self.page_nbytes
        numbers, refs = np.full(self.pages + 1, -1, dtype=np.int32), np.zeros(pages, dtype=np.int32)
        numbers[old], refs[new] = new, self.refs[old]
        for table in tables:
            table.table = numbers[table.table]
        self.refs, self._scraps = refs, 0
        return True

    def shrink(self) -> None:
        """Give the memory of free pages at the end back; page numbers stay valid."""
        held = np.flatnonzero(self.refs)
        pages = int(held[-1]) + 1 if len(held) else 0
        if pages < self.pages:
            self._arrays.clear()
            for name, spec in self.specs.items():
                self.planes[name] = self._made(spec, pages, self.planes[name])
            self.refs = self.refs[:pages].copy()

    def ensure(self, count: int) -> None:
        """`count` free pages: the pool grows by 1/32 when it runs out, in an arena as that says.

        In an arena page numbers may change, so that rows lie in runs.
        """
        if self.arena is None:
            if count > self.free:
                self.grow(max(count - self.free, self.pages // 32))
            return
        self.arena.check({self: count})
        if self._scraps * 16 > self.used and self._allowance >= self.used and self.lay(self.pages):
            self._allowance -= self.used

    def allocate(self, count: int) -> np.ndarray:
        """`count` page numbers with one reference each, in as long runs as there are."""
        return self.allocate_rows(np.array([count]), np.array([-1]))

    def allocate_rows(self, counts: np.ndarray, behind: np.ndarray) -> np.ndarray:
        """`counts[r]` page numbers for each row, row by row, with one reference each; in order where all are free.

        Those right behind page `behind[r]` (-1: the row has none), as far as they are free; see `kvfold.pages.runs`.
        """
        count = int(counts.sum())
        if count > self.free:
            self.ensure(count)
        if count == self.free and bool((behind < 0).all()):
            ids = np.flatnonzero(self.refs == 0).astype(np.int32)
        else:
            pages, scraps = place(self.refs == 0, self.run, counts, behind)
            ids, self._scraps = pages.astype(np.int32), self._scraps + scraps
        self.refs[ids] = 1
        self.used += count
        self._allowance += ALLOWED * count
        return ids

    def retain(self, ids: np.ndarray) -> None:
        """One more holder for each of `ids` (a number may occur several times)."""
        np.add.at(self.refs, ids, 1)
        self.shared = int((self.refs > 1).sum())

    def release(self, ids: np.ndarray) -> None:
        """One holder less for each of `ids`; a page that nobody holds is free."""
        np.subtract.at(self.refs, ids, 1)
        self.shared = int((self.refs > 1).sum())
        # No np.unique: it imports on first use, and a table may be finalised in the middle of an import.
        self.used -= len(set(ids[self.refs[ids] == 0].tolist()))

    def copy(self, ids: np.ndarray, source: "PagePool", origin: np.ndarray) -> None:
        """Our pages `ids` get what pages `origin` of `source` hold; a plane that it lacks gets its fill."""
        for name, plane in self.planes.items():
            known = source.planes.get(name)
            if known is None:
                plane[torch.from_numpy(ids.astype(np.int64)).to(self.device)] = self.specs[name].fill
            else:
                copy_pages(plane, ids, known, origin)

    def empty_like(self) -> "PagePool":
        """A pool of the same planes that holds nothing."""
        pool = PagePool(self.specs, self.device, self.page_size)
        pool.moved_nbytes = self.moved_nbytes
        return pool


def copy_pages(to: Tensor, ids: np.ndarray, source: Tensor, origin: np.ndarray) -> None:
    """Entries `ids` of a plane get those at `origin` of another: stretch by stretch where that is worth it."""
    cuts = np.flatnonzero((np.diff(ids) != 1) | (np.diff(origin) != 1)) + 1
    if len(cuts) * 4 > len(ids):
        here, there = (torch.from_numpy(x.astype(np.int64)).to(to.device) for x in (ids, origin))
        to[here] = source.index_select(0, there)
        return
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)], strict=True):
        if stop > start:
            first, since = int(ids[start]), int(origin[start])
            to[first : first + stop - start] = source[since : since + stop - start]
