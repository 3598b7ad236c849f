"""Pages: fixed-size blocks of tokens, a pool that owns them, and a table that says which row holds which.

A row is one (sequence, KV head). A pool has named planes, all indexed by page: `keys` (N, P, D), `values`
(N, P, D_v), and one (N, P) plane for each column. Pages are reference counted; a page that two rows
share is never written in place (copy-on-write).
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.pages.pool import PAGE_SIZE, PagePool, Plane

__all__ = ["PAGE_SIZE", "PagePool", "PageTable", "Plane"]


class PageTable:
    """Which pages each row holds, in order, and how many slots of them are filled.

    `table` is (R, M) page numbers, -1 where a row has no page; `lengths` is (R,) slots. Where `regular`, page i of
    row r is page r * M + i of the pool, and a dense read is a view that costs nothing. The first `hole_count[r]` of
    `holes[r]` are slots whose token was dropped: a page's worth of them gathers before the rest of the row moves up.
    """

    def __init__(self, pool: PagePool, rows: int):
        self.pool = pool
        self.table = np.full((rows, 0), -1, dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self.regular = True
        self.fill_holes()
        self._room = 0  # tokens that every row surely has room for
        self._known: list[np.ndarray | None] = [None] * 4  # what `on_device` has sent,
        self._sent: list[Tensor | None] = [None] * 4  # and where it lies

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Slots in the longest row."""
        return int(self.lengths.max()) if self.rows else 0

    @property
    def even(self) -> bool:
        """Every row has as many slots as every other."""
        return self.rows == 0 or bool((self.lengths == self.lengths[0]).all())

    @property
    def holed(self) -> bool:
        """Some row has a slot without a token."""
        return self.holes.shape[1] > 0 and bool(self.hole_count.any())

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each row, (R,)."""
        return self.lengths - self.hole_count

    def fill_holes(self) -> None:
        """No row has holes (any more)."""
        self.holes = np.zeros((self.rows, 0), dtype=np.int32)
        self.hole_count = np.zeros(self.rows, dtype=np.int32)

    def allow_holes(self) -> None:
        """Room to remember a page's worth of them in each row."""
        if not self.holes.shape[1]:
            self.holes = np.zeros((self.rows, self.pool.page_size), dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of the table itself, and of its copy on a device; the pool counts its own."""
        copies = sum(x.nbytes for x in self._sent if x is not None)
        return self.table.nbytes + self.lengths.nbytes + self.holes.nbytes + self.hole_count.nbytes + copies

    @property
    def exclusive(self) -> bool:
        """Nobody else holds a page of this pool, and no two rows share one."""
        return self.pool.shared == 0 and int((self.table >= 0).sum()) == self.pool.used

    @property
    def shared(self) -> bool:
        """Some page of ours is held more than once, by another table or by two rows."""
        return self.pool.shared > 0 and bool((self.pool.refs[self.table[self.table >= 0]] > 1).any())

    def on_device(self) -> tuple[Tensor, ...]:
        """(table, lengths, holes, hole_count) where the pool is, for the kernels: sent when they have changed.

        The arrays are never changed in place on a device, so it is enough to see whether they are the same ones. The
        tensors stay the same ones as long as their shapes do: a CUDA graph reads where it was captured.
        """
        arrays = (self.table, self.lengths, self.holes, self.hole_count)
        for i, array in enumerate(arrays):
            if array is not self._known[i]:
                # A few columns more than the table has: it grows by one whenever the longest row gets a page.
                wide = np.pad(array, ((0, 0), (0, -array.shape[1] % 8)), constant_values=-1) if i == 0 else array
                self._sent[i] = _send(wide, self._sent[i], self.pool.device)
                self._known[i] = array
        return tuple(x for x in self._sent if x is not None)

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

    def cut(self, counts: np.ndarray) -> None:
        """Keep the first `counts[r]` tokens of each row, and the holes right behind them; the pages stay."""
        lengths = np.minimum(counts, self.counts).astype(np.int32)
        for k in range(self.holes.shape[1]):  # ascending
            lengths += (k < self.hole_count) & (self.holes[:, k] <= lengths)
        known = np.arange(self.holes.shape[1]) < self.hole_count[:, None]
        self.hole_count = (known & (self.holes < lengths[:, None])).sum(1).astype(np.int32)
        self.lengths = lengths

    def valid(self) -> Bool[Tensor, "R T"]:
        """Which slots of a dense read are tokens."""
        lengths = torch.from_numpy(self.lengths).to(self.pool.device)
        valid = torch.arange(self.longest, device=self.pool.device) < lengths[:, None]
        if self.holed:
            rows, slots = _spans(np.zeros_like(self.hole_count), self.hole_count)
            valid[self._index(rows), self._index(self.holes[rows, slots])] = False
        return valid

    def dense(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A plane as (R, T, ...), from slot `start` to `stop`, or to the longest row's end.

        A view where pages lie side by side, else a gather.
        """
        stop, size = self.longest if stop is None else min(stop, self.longest), self.pool.page_size
        if self.regular:
            return self.block(name)[:, start:stop]
        plane, first = self.pool.planes[name], start // size
        held = np.maximum(self.table[:, first : -(-stop // size)], 0)
        ids = torch.from_numpy(held.reshape(-1)).to(plane.device)
        wide = plane.index_select(0, ids).reshape(self.rows, held.shape[1] * size, *plane.shape[2:])
        return wide[:, start - first * size : stop - first * size]

    def block(self, name: str) -> Tensor:
        """A plane of a regular table as (R, M * P, ...), to read or to write in place."""
        plane, per_row = self.pool.planes[name], self.table.shape[1]
        return plane[: self.rows * per_row].view(self.rows, per_row * self.pool.page_size, *plane.shape[2:])

    def release(self) -> None:
        """Let go of every page."""
        self.pool.release(self.table[self.table >= 0])
        self.table = np.full((self.rows, 0), -1, dtype=np.int32)
        self.lengths = np.zeros_like(self.lengths)
        self.regular, self._room = True, 0
        self.fill_holes()

    def restart(self) -> None:
        """Let go of every page and go on in an empty pool of our own."""
        self.release()
        self.pool = self.pool.empty_like()

    def __del__(self) -> None:
        # A fork that goes out of scope must not keep its pages shared for the others.
        held = self.table[self.table >= 0]
        if len(held):
            self.pool.release(held)

    def fork(self) -> "PageTable":
        """A second table over the same pages."""
        return self.select(np.arange(self.rows))

    def select(self, rows: np.ndarray) -> "PageTable":
        """A table whose row i is row `rows[i]` of this one, sharing its pages."""
        other = PageTable(self.pool, len(rows))
        other.table, other.lengths = self.table[rows].copy(), self.lengths[rows].copy()
        other.holes, other.hole_count = self.holes[rows].copy(), self.hole_count[rows].copy()
        identity = len(rows) == self.rows and bool((rows == np.arange(self.rows)).all())
        other.regular = self.regular and (identity or not self.table.shape[1])
        self.pool.retain(other.table[other.table >= 0])
        return other

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
        rows, slot = _spans(self.lengths, counts)
        self._reserve(self.lengths + counts)
        place = self.writable(rows, slot)
        self.lengths = (self.lengths + counts).astype(np.int32)
        return place

    def writable(self, rows: np.ndarray, slot: np.ndarray) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Page and offset of slots that are about to be written; what others hold of those pages is copied first."""
        if self.pool.shared:
            self._own(np.unique(np.stack([rows, slot // self.pool.page_size]), axis=1))
        return self._at(rows, slot)

    def _at(self, rows: np.ndarray, slot: np.ndarray) -> tuple[Tensor, Tensor]:
        """Page and offset of slots."""
        pages, offsets = self.table[rows, slot // self.pool.page_size], slot % self.pool.page_size
        return self._index(pages), self._index(offsets)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.pool.device)

    def put(self, planes: Mapping[str, Tensor], start: int, stop: np.ndarray) -> None:
        """Write (R, T, ...) tensors in place, by plane, to slots `start` to `stop[r]` of each row; none is shared."""
        if not planes or self.regular:
            for name, new in planes.items():
                place = self.block(name)[:, start : start + new.shape[1]]
                if new.data_ptr() != place.data_ptr():  # a view of these very pages has nothing to write
                    place.copy_(new)
            return
        rows, slot = _spans(np.full(self.rows, start), np.maximum(stop - start, 0))
        pages, offsets = self._at(rows, slot)
        source = self._index(rows), self._index(slot - start)
        for name, new in planes.items():
            plane = self.pool.planes[name]
            plane[pages, offsets] = new[source].to(plane.dtype)

    def extend(self, count: int) -> np.ndarray:
        """Make room for `count` more tokens in every row and move the lengths on; the slots (R,) where they start."""
        start = self.lengths
        self._reserve(start + np.int32(count))
        self.lengths = start + np.int32(count)
        return start

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
        if self.regular and self.exclusive and _nearly_even(needed):
            # Rows of like length stay side by side: move to a larger block now and then, by 1/32 at a time once
            # something is stored: growing token by token moves 32 tokens for each new one, and a step reads them all.
            slack = max(1, int(needed.max()) // 32) if self.longest else 0
            self.relocate(int(needed.max()) + slack)
            return
        self.regular = False
        width = int(needed.max())
        if width > self.table.shape[1]:
            more = np.full((self.rows, width - self.table.shape[1]), -1, dtype=np.int32)
            self.table = np.concatenate([self.table, more], axis=1)
        fresh = self.pool.allocate(int(np.maximum(needed - have, 0).sum()))
        place = np.arange(self.table.shape[1])[None]
        self.table = self.table.copy()  # never changed in place: see `on_device`
        self.table[(place >= have[:, None]) & (place < needed[:, None])] = fresh

    def _own(self, places: np.ndarray) -> None:
        """Copy-on-write: the pages at `places` (row, index) are about to be written."""
        rows, index = places
        old = self.table[rows, index]
        pages, first, writers = np.unique(old, return_index=True, return_counts=True)
        copied = self.pool.refs[old] > 1
        copied[first[writers == self.pool.refs[pages]]] = False  # all holders write: one of them keeps the page
        if not copied.any():
            return
        old = old[copied]
        new = self.pool.allocate(len(old))
        source, target = self._index(old), self._index(new)
        for plane in self.pool.planes.values():
            plane[target] = plane.index_select(0, source)
        self.pool.release(old)
        self.table = self.table.copy()
        self.table[rows[copied], index[copied]] = new
        self.regular = False

    def relocate(self, per_row: int) -> None:
        """Move to a pool of our own with `per_row` pages side by side for each row; the old pages are let go."""
        pool, ids, _ = self.room_for(np.full(self.rows, per_row))
        longest = self.longest
        for name in pool.planes:
            target = pool.planes[name]
            block = target.view(self.rows, per_row * pool.page_size, *target.shape[2:])
            if longest:
                block[:, :longest] = self.dense(name)
        self.move_to(pool, ids, regular=True)

    def room_for(self, pages: np.ndarray) -> tuple[PagePool, np.ndarray, bool]:
        """A new pool with `pages[r]` pages side by side for each row, who has which, and whether that is regular.

        Rows that need almost as many get the same number.
        """
        regular = _nearly_even(pages)
        wide = np.full(self.rows, pages.max() if self.rows else 0) if regular else pages
        pool = self.pool.empty_like()
        pool.grow(int(wide.sum()))
        table = np.full((self.rows, int(wide.max()) if self.rows else 0), -1, dtype=np.int32)
        table[np.arange(table.shape[1])[None] < wide[:, None]] = pool.allocate(int(wide.sum()))
        return pool, table, regular

    def move_to(self, pool: PagePool, table: np.ndarray, *, regular: bool) -> None:
        """Our tokens lie there now; the old pages are let go."""
        self.pool.release(self.table[self.table >= 0])
        self.pool, self.table, self.regular, self._room = pool, table, regular, 0

    def trim(self, *, slack: bool = False) -> None:
        """Let go of every page past a row's length, and give the memory back where the pool is ours alone.

        `slack`: not while they are few beside what is held, lest every step of give and take moves all tokens.
        """
        needed = -(-self.lengths // self.pool.page_size)
        spare = (np.arange(self.table.shape[1])[None] >= needed[:, None]) & (self.table >= 0)
        self._room = 0
        if not spare.any() and not (self.exclusive and self.pool.used < self.pool.pages):
            return
        longest = int(needed.max()) if self.rows else 0
        if slack and int(spare.sum()) <= self.rows * (1 + 2 * max(1, longest // 32)):
            return
        if not self.exclusive:
            self.pool.release(self.table[spare])
            self.table = np.where(spare, np.int32(-1), self.table)
            self.regular = False
        elif _nearly_even(needed):
            self.relocate(longest)
        else:
            self._scatter_to_exact(needed)

    def compact(self) -> None:
        """Where this table alone uses the pool and more than a quarter of it is free: move to a pool of what is held.

        Rows go on sharing the pages that they share.
        """
        pool, here = self.pool, self.table >= 0
        held = self.table[here]
        if int(pool.refs.sum()) != len(held) or (pool.pages - pool.used) * 4 <= pool.pages:
            return
        pages, first, which = np.unique(held, return_index=True, return_inverse=True)
        order = np.argsort(first)  # as the rows hold them, so that rows that share nothing lie side by side
        number = np.empty(len(order), dtype=np.int32)
        number[order] = np.arange(len(order), dtype=np.int32)
        mine = self._index(pages[order])
        self.pool = pool.empty_like()
        self.pool.grow(len(pages))
        self.pool.allocate(len(pages))
        for name, plane in pool.planes.items():
            self.pool.planes[name].copy_(plane.index_select(0, mine))
        self.pool.refs[:] = 0
        self.table = self.table.copy()
        self.table[here] = number[which]
        self.pool.retain(self.table[here])
        pool.release(held)
        self.regular = bool((self.table == np.arange(self.table.size).reshape(self.table.shape)).all())

    def _scatter_to_exact(self, needed: np.ndarray) -> None:
        """Rows of different lengths: a pool with exactly their pages, each row's side by side."""
        pool, table, regular = self.room_for(needed)
        mine = self._index(self.table[:, : table.shape[1]][table >= 0])
        for name, plane in self.pool.planes.items():
            pool.planes[name].copy_(plane.index_select(0, mine))
        self.move_to(pool, table, regular=regular)


def _send(array: np.ndarray, place: Tensor | None, device: torch.device) -> Tensor:
    """A copy on the device: in `place`, where it fits."""
    if place is None or place.shape != array.shape:
        return torch.from_numpy(array).to(device, copy=True)
    return place.copy_(torch.from_numpy(array), non_blocking=True)


def _nearly_even(pages: np.ndarray) -> bool:
    """Giving every row as many pages as the longest wastes at most 2 %."""
    return len(pages) == 0 or int(pages.max()) * len(pages) <= 1.02 * int(pages.sum())


def _spans(start: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and slot of `counts[r]` slots from `start[r]` on, row by row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, start[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
