"""The pool: fixed-size blocks of tokens, who holds them, and where they lie."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable
from weakref import WeakValueDictionary

import numpy as np
import torch

from kvfold.pages.runs import RUN_BYTES, broken, laid, place
from kvfold.pages.storage import PAGE_SIZE, Memory, Plane, Storage

BROKEN = 24
"""One part in so many of the pages in use may come to lie in short runs before an arena lays rows anew."""
ALLOWED = 4
"""Pages that are copied for it, at most, for each one that was handed out."""


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
    """A table of pages, (R, M), -1 where a row has none: see `TableRows`."""

    table: np.ndarray
    regular: bool
    scattered: bool


class PagePool(Storage):
    """The storage of one segment: N pages of P tokens in each plane, and their reference counts.

    With an `arena` it is that of many; with a `memory` its planes lie there, and not all of them are here.
    `moved_nbytes` counts what was copied from page to page so that rows lie in runs and nothing is held in vain; a pool
    that takes another one's place goes on counting.
    """

    def __init__(
        self, planes: Mapping[str, Plane], device: torch.device, page_size: int = PAGE_SIZE, arena: Limit | None = None,
        memory: Memory | None = None,
    ):  # fmt: skip
        super().__init__(planes, device, page_size, memory)
        self.arena = arena
        self.refs = np.zeros(0, dtype=np.int32)
        self.used = 0  # pages that somebody holds
        self.shared = 0  # pages with more than one reference
        self.moved_nbytes = 0
        self.handed = self.mended = 0  # pages handed out, and those copied because of short runs
        self.tables: WeakValueDictionary[int, Holder] = WeakValueDictionary()  # who may hold pages, by id
        self._looked = self._least = 0  # `handed` at the last look for short runs; what was left of them then

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
            self.planes[name] = self.made(spec, self.pages)
            self.per_page |= spec.per_page

    def grow(self, pages: int) -> None:
        """Add free pages; page numbers may change, as `lay` says."""
        if self.arena is not None:
            self.arena.reserve(pages, pages * self.page_nbytes)
        if self.lay(self.pages + pages):
            return
        self.remake(self.pages + pages)
        self.refs = np.concatenate([self.refs, np.zeros(pages, dtype=np.int32)])

    def lay(self, pages: int) -> bool:
        """Lay the rows of all tables in runs, in a pool of so many pages; page numbers change.

        False, and nothing is done, where somebody holds pages who is no table, or a table keeps its pages' numbers.
        """
        tables, rows = list(self.tables.values()), self._rows()
        if not rows or (self.arena is None and any(table.scattered for table in tables)):
            return False
        if not np.array_equal(np.bincount(np.concatenate(rows), minlength=self.pages), self.refs):
            return False
        old, new = laid(rows, self.run, pages)
        self.remake(pages, new, old)
        self.moved_nbytes += len(old) * self.page_nbytes
        numbers, refs = np.full(self.pages + 1, -1, dtype=np.int32), np.zeros(pages, dtype=np.int32)
        numbers[old], refs[new] = new, self.refs[old]
        for table in tables:
            table.table, table.regular = numbers[table.table], False
        self.refs, self._looked, self._least = refs, self.handed, broken(self._rows(), self.run)
        return True

    def _rows(self) -> list[np.ndarray]:
        return [row[row >= 0] for table in self.tables.values() for row in table.table]

    def shrink(self) -> None:
        """Give the memory of free pages at the end back; page numbers stay valid."""
        held = np.flatnonzero(self.refs)
        pages = int(held[-1]) + 1 if len(held) else 0
        if pages < self.pages:
            self.remake(pages)
            self.refs = self.refs[:pages].copy()

    def ensure(self, count: int) -> None:
        """`count` free pages: the pool grows by 1/32 when it runs out, in an arena as that says.

        Page numbers may change, so that rows lie in runs (docs/adr/0010): read them afterwards.
        """
        if self.arena is None:
            if count > self.free:
                self.grow(max(count - self.free, self.pages // 32))
            return
        self.arena.check({self: count})
        if (self.handed - self._looked) * BROKEN > self.used and self.mended + self.used <= ALLOWED * self.handed:
            self._looked, found = self.handed, broken(self._rows(), self.run)
            if (found - self._least) * BROKEN > self.used and self.lay(self.pages):
                self.mended += self.used

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
            ids = place(self.refs == 0, self.run, counts, behind).astype(np.int32)
        self.refs[ids] = 1
        self.used += count
        self.handed += count
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

    def empty_like(self) -> "PagePool":
        """A pool of the same planes that holds nothing."""
        pool = PagePool(self.specs, self.device, self.page_size, memory=self.memory)
        pool.moved_nbytes = self.moved_nbytes
        return pool

    def moved(self, ids: np.ndarray, origin: np.ndarray, pages: int) -> "PagePool":
        """A pool of so many pages, all held, whose pages `ids` are what pages `origin` are here."""
        pool = self.empty_like()
        for name, spec in self.specs.items():
            pool.planes[name] = pool.made(spec, pages, self.planes[name], ids=ids, origin=origin)
        pool.refs, pool.used = np.ones(pages, dtype=np.int32), pages
        pool.moved_nbytes += len(ids) * self.page_nbytes
        return pool
