"""Who holds what: the pages of each row, in order, and how many slots of them are filled."""

from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.pages.pool import PagePool


def frozen(name: str) -> Any:
    """A field with an array that is read-only once it is set: by identity one sees that it is the same.

    It is read without a call of Python's, as steps do often.
    """

    def put(rows: Any, array: np.ndarray) -> None:
        array.flags.writeable = False
        setattr(rows, f"_{name}", array)

    return property(attrgetter(f"_{name}"), put)


class TableRows:
    """`table` is (R, M) page numbers, -1 where a row has no page; `lengths` is (R,) slots.

    Where `regular`, page i of row r is page r * M + i of the pool, and a dense read is a view that costs nothing. One
    made `scattered` never is, and keeps its pages' numbers while rows grow: that is for few pages, which come and go.
    In an arena tables are neither. The first `hole_count[r]` of `holes[r]` are slots whose token
    was dropped: a page's worth of them gathers before the rest of the row moves up.
    """

    table: np.ndarray = frozen("table")
    holes: np.ndarray = frozen("holes")
    hole_count: np.ndarray = frozen("hole_count")

    def __init__(self, pool: PagePool, rows: int, *, scattered: bool = False):
        self._pool: PagePool | None = None
        self.pool = pool
        self.scattered = scattered or pool.arena is not None
        self.table = np.full((rows, 0), -1, dtype=np.int32)
        self.lengths = np.zeros(rows, dtype=np.int32)
        self.regular = not self.scattered
        self.fill_holes()
        self._room = 0  # tokens that every row surely has room for
        self._known: list[np.ndarray | None] = [None] * 4  # what `on_device` has sent,
        self._sent: list[Tensor | None] = [None] * 4  # and where it lies

    def _set_lengths(self, lengths: np.ndarray) -> None:
        lengths.flags.writeable = False
        self._lengths, self.rows = lengths, len(lengths)
        self.longest = int(lengths.max()) if self.rows else 0  # slots in the longest row

    lengths: np.ndarray = property(attrgetter("_lengths"), _set_lengths)  # type: ignore[assignment]

    def _set_pool(self, pool: PagePool) -> None:
        if self._pool is not None:
            self._pool.tables.pop(id(self), None)
        self._pool = pool
        pool.tables[id(self)] = self

    pool: PagePool = property(attrgetter("_pool"), _set_pool)  # type: ignore[assignment]

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
        counts: np.ndarray = self.lengths - self.hole_count
        return counts

    @property
    def held(self) -> np.ndarray:
        """Page numbers, row by row; one that two rows share comes twice."""
        held: np.ndarray = self.table[self.table >= 0]
        return held

    @property
    def needed(self) -> np.ndarray:
        """Pages that each row's slots take, (R,)."""
        needed: np.ndarray = -(-self.lengths // np.int32(self.pool.page_size))
        return needed

    @property
    def nbytes(self) -> int:
        """Bytes of the table itself, and of its copy on a device; of its pages too, where an arena has them."""
        copies = sum(x.nbytes for x in self._sent if x is not None)
        pages = 0 if self.pool.arena is None else len(np.unique(self.held)) * self.pool.page_nbytes
        return self.table.nbytes + self.lengths.nbytes + self.holes.nbytes + self.hole_count.nbytes + copies + pages

    def bytes_beside(self, counted: set[int]) -> int:
        """Bytes of the table and of what it lies on, without what is `counted`, which then holds ours too.

        That is the pool, by its id; of one in an arena the pages, by numbers that no id has.
        """
        pool = id(self.pool)
        if self.pool.arena is None:
            fresh = 0 if pool in counted else self.pool.nbytes
            counted.add(pool)
            return self.nbytes + fresh
        pages = {(pool << 32) + page for page in self.held.tolist()}
        known = len(pages & counted) * self.pool.page_nbytes
        counted |= pages
        return self.nbytes - known

    @property
    def exclusive(self) -> bool:
        """Nobody else holds a page of this pool, and no two rows share one."""
        return self.pool.arena is None and self.pool.shared == 0 and int((self.table >= 0).sum()) == self.pool.used

    @property
    def shared(self) -> bool:
        """Some page of ours is held more than once, by another table or by two rows."""
        return self.pool.shared > 0 and bool((self.pool.refs[self.held] > 1).any())

    def same_pages(self, other: "TableRows") -> bool:
        """Whether both hold the same pages, and as much of them."""
        same = self.pool is other.pool and np.array_equal(self.lengths, other.lengths)
        return same and np.array_equal(self.table, other.table) and not (self.holed or other.holed)

    def fill_holes(self) -> None:
        """No row has holes (any more)."""
        self.holes = np.zeros((self.rows, 0), dtype=np.int32)
        self.hole_count = np.zeros(self.rows, dtype=np.int32)

    def copy_holes(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of `holes` and `hole_count` to be written and set, with room for a page's worth in each row."""
        known = self.holes.shape[1] > 0
        holes = self.holes.copy() if known else np.zeros((self.rows, self.pool.page_size), dtype=np.int32)
        return holes, self.hole_count.copy()

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and slot of all slots, row by row."""
        return spans(np.zeros_like(self.lengths), self.lengths)

    def cut(self, counts: np.ndarray) -> None:
        """Keep the first `counts[r]` tokens of each row, and the holes right behind them; the pages stay."""
        lengths = np.minimum(counts, self.counts).astype(np.int32)
        for k in range(self.holes.shape[1]):  # ascending
            lengths += (k < self.hole_count) & (self.holes[:, k] <= lengths)
        known = np.arange(self.holes.shape[1]) < self.hole_count[:, None]
        self.hole_count = (known & (self.holes < lengths[:, None])).sum(1).astype(np.int32)
        self.lengths = lengths

    def release(self) -> None:
        """Let go of every page."""
        self.pool.release(self.held)
        self.forget()

    def forget(self) -> None:
        """Hold no page; another table has taken ours over."""
        self.table = np.full((self.rows, 0), -1, dtype=np.int32)
        self.lengths = np.zeros_like(self.lengths)
        self.regular, self._room = not self.scattered, 0
        self.fill_holes()

    def restart(self) -> None:
        """Let go of every page and go on in an empty pool of our own, or in the arena's."""
        self.release()
        if self.pool.arena is None:
            self.pool = self.pool.empty_like()

    def __del__(self) -> None:
        # A fork that goes out of scope must not keep its pages shared for the others.
        held = self.held
        if len(held):
            self.pool.release(held)

    def on_device(self) -> tuple[Tensor, ...]:
        """(table, lengths, holes, hole_count) where the pool is, for the kernels: sent when they have changed.

        The arrays are never changed in place, so it is enough to see whether they are the same ones. The tensors
        stay the same ones as long as their shapes do: a CUDA graph reads where it was captured.
        """
        arrays = (self.table, self.lengths, self.holes, self.hole_count)
        for i, array in enumerate(arrays):
            if array is not self._known[i]:
                # A few columns more than the table has: it grows by one whenever the longest row gets a page.
                wide = np.pad(array, ((0, 0), (0, -array.shape[1] % 8)), constant_values=-1) if i == 0 else array
                self._sent[i] = _send(wide, self._sent[i], self.pool.device)
                self._known[i] = array
        return tuple(x for x in self._sent if x is not None)


def _send(array: np.ndarray, place: Tensor | None, device: torch.device) -> Tensor:
    """A copy on the device: in `place`, where it fits."""
    if place is None or place.shape != array.shape:
        with torch.inference_mode(False):  # it may be written outside
            return torch.from_numpy(array.copy()).to(device)
    return place.copy_(torch.from_numpy(array.copy()), non_blocking=True)


def spans(start: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and slot of `counts[r]` slots from `start[r]` on, row by row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, start[rows] + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def nearly_even(pages: np.ndarray) -> bool:
    """Giving every row as many pages as the longest wastes at most 2 %."""
    return len(pages) == 0 or int(pages.max()) * len(pages) <= 1.02 * int(pages.sum())
