"""The page table: rows that grow, are written, share their pages, and copy what others hold before they write it."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int
from torch import Tensor

from kvfold.pages.moving import Moving
from kvfold.pages.rows import nearly_even, spans


class PageTable(Moving):
    """Which pages each row holds, and room for more: see `TableRows` for what it keeps, `Planes` for what lies there.

    Where an arena has no room for what a call needs it raises OutOfPages, and nothing has changed.
    """

    def pages_for(self, more: np.ndarray) -> int:
        """Pages that must be free for `more[r]` more tokens in row r: new ones, and copies of shared ones."""
        size, held, index = self.pool.page_size, self.table >= 0, np.arange(self.table.shape[1])
        stop = -(-(self.lengths + more) // size)
        fresh = int(np.maximum(stop - held.sum(1), 0).sum())
        if not self.pool.shared:
            return fresh
        first = np.where(more > 0, self.lengths // size, stop)
        written = held & (index >= first[:, None]) & (index < stop[:, None])
        return fresh + int((self.pool.refs[self.table[written]] > 1).sum())

    def reserve(self) -> None:
        """Pages for one more token in each row, here and on the device; nothing is counted yet."""
        self._reserve(self.lengths + np.int32(1))
        self._room += 1
        self.on_device()

    def step(self) -> tuple[Tensor, ...]:
        """`extend` by one token that a kernel will count on the device: `on_device` as that kernel finds it."""
        start = self.lengths
        self.extend(1)
        after, self.lengths = self.lengths, start
        sent = self.on_device()
        self.lengths = self._known[1] = after
        return sent

    def extend(self, count: int) -> np.ndarray:
        """Make room for `count` more tokens in every row, to be written in place, and move the lengths on.

        The slots (R,) where they start.
        """
        start = self.lengths
        if self.pool.shared:
            self._claim(np.full(self.rows, count, dtype=np.int32))
        else:
            self._reserve(start + np.int32(count))
            self.lengths = start + np.int32(count)
        return start

    def tail(self, count: int) -> slice | None:
        """Where `count` more tokens go in a dense view when that is the same for all rows and can be written in place.

        Moves the lengths on; None (and nothing changed) where rows differ or pages are shared or scattered.
        """
        if not self.regular or self.pool.shared or not self.even:
            return None
        start = self.longest
        if not self._reserve(self.lengths + count):
            return None
        self.lengths = self.lengths + np.int32(count)
        return slice(start, start + count)

    def slots(self, counts: np.ndarray) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Make room for `counts[r]` more tokens in row r; page and offset of each, row by row, and lengths moved on."""
        return self._at(*self._claim(counts))

    def writable(self, rows: np.ndarray, slots: np.ndarray) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Page and offset of slots that are about to be written; what others hold of those pages is copied first."""
        self._own(rows, slots)
        return self._at(rows, slots)

    def write(self, rows: np.ndarray, slots: np.ndarray, planes: Mapping[str, Tensor]) -> None:
        """Write `planes` (N, ...) at slots of rows; what others hold of those pages is copied first."""
        self._scatter(*self.writable(rows, slots), planes)

    def add(self, counts: np.ndarray, planes: Mapping[str, Tensor]) -> None:
        """`counts[r]` more tokens in row r: `planes` (N, ...) hold them row by row, without gaps; the rest is fill.

        What a page has once is given for each page that they begin.
        """
        rows, slots = self._claim(counts)
        pages, offsets = self._at(rows, slots)
        begins = offsets == 0
        number = begins.cumsum(0) - 1  # the how-manieth page that they begin
        for some in self._visits(self.pool.specs, pages, written=True):
            begun = pages[some][begins[some]], number[some][begins[some]]
            for name, spec in self.pool.specs.items():
                plane, new = self.pool.planes[name], planes.get(name)
                place = (begun[0],) if spec.per_page else (pages[some], offsets[some])
                mine = begun[1] if spec.per_page else some
                plane[place] = spec.fill if new is None else self.pool.lowered(new[mine].to(plane.dtype))

    def fork(self) -> "PageTable":
        """A second table over the same pages."""
        return self.select(np.arange(self.rows))

    def select(self, rows: np.ndarray) -> "PageTable":
        """A table whose row i is row `rows[i]` of this one, sharing its pages."""
        other = PageTable(self.pool, len(rows), scattered=self.scattered)
        other.table, other.lengths = self.table[rows].copy(), self.lengths[rows].copy()
        other.holes, other.hole_count = self.holes[rows].copy(), self.hole_count[rows].copy()
        identity = len(rows) == self.rows and bool((rows == np.arange(self.rows)).all())
        other.regular = self.regular and (identity or not self.table.shape[1])
        self.pool.retain(other.held)
        return other

    def _claim(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row and slot of `counts[r]` more tokens in row r, on pages that are ours alone; lengths moved on."""
        rows, slots = spans(self.lengths, counts)
        if self.pool.shared and self.pool.arena is not None:
            self.pool.ensure(self.pages_for(counts))  # for both of what follows, or for none
        self._reserve(self.lengths + counts)
        self._own(rows, slots)
        self.lengths = (self.lengths + counts).astype(np.int32)
        return rows, slots

    def _reserve(self, lengths: np.ndarray) -> bool:
        """Pages for `lengths` tokens in each row; whether the table is regular then."""
        more = int((lengths - self.lengths).max()) if self.rows else 0
        if more > self._room:
            self._reserve_pages(lengths)
            self._room = int(((self.table >= 0).sum(1) * self.pool.page_size - self.lengths).min())
        self._room -= more
        return self.regular

    def _reserve_pages(self, lengths: np.ndarray) -> None:
        needed = -(-lengths // self.pool.page_size)
        have = (self.table >= 0).sum(1)
        if bool((needed <= have).all()):
            return
        more = np.maximum(needed - have, 0)
        even = self.regular and nearly_even(needed)
        if self.exclusive and not self.scattered and (even or int(more.sum()) > self.pool.free):
            # A pool that must grow is copied anyhow: each row gets its pages side by side, those that it asks for and
            # 1/32 of what rows have more, once something is stored. Growing token by token moves 32 tokens for each
            # new one, and a step reads them all.
            grows = np.full(self.rows, True) if even else lengths > self.lengths
            slack = -(-int(needed[grows].mean()) // 32) if self.longest else 0
            self.relocate((np.full(self.rows, needed.max()) if even else needed) + slack * grows)
            return
        self.pool.ensure(int(more.sum()))  # before numbers of pages are read: they may be others afterwards
        ends = np.pad(self.table, ((0, 0), (1, 0)), constant_values=-1)[np.arange(self.rows), have]
        fresh = self.pool.allocate_rows(more, ends)
        width = max(int(needed.max()), self.table.shape[1])
        place = np.arange(width)[None]
        table = np.pad(self.table, ((0, 0), (0, width - self.table.shape[1])), constant_values=-1)
        table[(place >= have[:, None]) & (place < needed[:, None])] = fresh
        self.table, self.regular = table, False

    def _own(self, rows: np.ndarray, slots: np.ndarray) -> None:
        """Copy-on-write: slots of rows are about to be written."""
        index = slots // self.pool.page_size
        if not self.pool.shared or not (self.pool.refs[self.table[rows, index]] > 1).any():
            return
        rows, index = np.unique(np.stack([rows, index]), axis=1)
        old = self.table[rows, index]
        pages, first, writers = np.unique(old, return_index=True, return_counts=True)
        copied = self.pool.refs[old] > 1
        copied[first[writers == self.pool.refs[pages]]] = False  # all holders write: one of them keeps the page
        if not copied.any():
            return
        self.pool.ensure(int(copied.sum()))
        old = self.table[rows, index][copied]
        new = self.pool.allocate_rows(np.ones_like(old), np.full_like(old, -1))
        self.pool.copy(new, self.pool, old)
        self.pool.release(old)
        table = self.table.copy()
        table[rows[copied], index[copied]] = new
        self.table, self.regular = table, False
