"""Planes that lie in a file, and as much of them in memory as is allowed: who touches them says so first."""

import ctypes
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.pages.planes import Planes
from kvfold.pages.pool import PagePool
from kvfold.pages.residency import Blocks, Moves, Residency
from kvfold.pages.spill import UNIT, Range, SpillFile
from kvfold.pages.storage import copy_pages
from kvfold.pages.stretch import PageStretch

ROOM = 2
"""Times what a plane takes that it can grow to in place; then it is copied."""
WRITTEN = 1024
"""Tokens of a row that are written at once: kernels take them in copies, which are memory, too."""
NONE: Blocks = np.zeros(0, dtype=np.int64)
Wanted = Callable[[int, int], tuple[Blocks, Blocks]]
"""The blocks that a stretch reads, and those that it writes."""


class FastMemory:
    """At most `nbytes` in memory: of the planes that are made here, in `file`, and of what stands beside.

    A plane's bytes are the process's from the moment when they are touched until their room is wanted for others. What
    is read without a word is let go of by the next `sweep`. All caches that share pages share one of these.
    """

    def __init__(self, nbytes: int, file: SpillFile, policy: str = "lfu"):
        self.nbytes, self.file, self.residency = nbytes, file, Residency(nbytes, UNIT, policy)
        self._ranges: dict[int, Range] = {}  # by the address of the plane
        self._memory: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # of ranges, while in use
        self._beside: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._last: weakref.WeakKeyDictionary[PagePool, Blocks] = weakref.WeakKeyDictionary()  # what was read
        self._open: weakref.WeakKeyDictionary[PagePool, Blocks] = weakref.WeakKeyDictionary()  # where rows end

    # -- planes --------------------------------------------------------------------------------------------------

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A plane of zeros, none of it in memory. Raises SpillFull."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        made = self.file.take(nbytes, ROOM * nbytes)
        memory = (ctypes.c_char * made.room).from_address(made.address)
        self._ranges[made.address], self._memory[made.address] = made, memory
        # The range is nobody's when the last tensor over its memory goes; at the process's end it simply ends.
        weakref.finalize(memory, self._free, made).atexit = False
        return over(memory, shape, dtype)

    def resized(self, plane: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The same plane with more or fewer entries, where it is. None: it has no room there. Raises SpillFull."""
        nbytes, some = int(np.prod(shape)) * plane.dtype.itemsize, self._ranges.get(plane.data_ptr())
        if some is None or not 0 < nbytes <= some.room:
            return None
        before = some.nbytes
        self.file.resize(some, nbytes)
        self._forget(some.start + some.nbytes, before - some.nbytes)
        return over(self._memory[some.address], shape, plane.dtype)

    def copy(self, made: Tensor, ids: np.ndarray, known: Tensor, origin: np.ndarray) -> None:
        """Entries `ids` of a plane get those at `origin` of another, a stretch after the other."""

        def wanted(start: int, stop: int) -> tuple[Blocks, Blocks]:
            return self.blocks(known, origin[start:stop]), self.blocks(made, ids[start:stop])

        for start, stop in self._in_turn(len(ids), wanted):
            copy_pages(made, ids[start:stop], known, origin[start:stop])

    def _free(self, some: Range) -> None:
        self._ranges.pop(some.address, None)
        self._forget(some.start, some.nbytes)
        self.file.give_back(some)

    def _forget(self, start: int, nbytes: int) -> None:
        if nbytes > 0:
            self.residency.forget(np.arange(start // UNIT, (start + nbytes) // UNIT))

    # -- who touches what ----------------------------------------------------------------------------------------

    def blocks(self, plane: Tensor, pages: Int[np.ndarray, " _"]) -> Blocks:
        """The blocks that pages of a plane lie on, each once; none of what is not here."""
        some = self._ranges.get(plane.data_ptr()) if len(plane) else None
        if some is None or not len(pages):
            return NONE
        size = plane.nbytes // len(plane)
        marks = np.zeros(some.nbytes // UNIT, dtype=bool)
        first, last = pages.astype(np.int64) * size // UNIT, ((pages.astype(np.int64) + 1) * size - 1) // UNIT
        for step in range(int((last - first).max()) + 1):
            marks[np.minimum(first + step, last)] = True
        return np.flatnonzero(marks) + some.start // UNIT

    def visits(
        self, planes: Iterable[Tensor], pages: Int[np.ndarray, " _"], *, written: bool = False
    ) -> Iterator[slice]:
        """Stretches of a list of pages that have room together; each is there until the next is asked for."""
        held = list(planes)

        def wanted(start: int, stop: int) -> tuple[Blocks, Blocks]:
            found = np.concatenate([NONE, *(self.blocks(plane, pages[start:stop]) for plane in held)])
            return (NONE, found) if written else (found, NONE)

        for start, stop in self._in_turn(len(pages), wanted):
            yield slice(start, stop)

    def in_turn(self, table: Planes) -> Iterator[tuple[int, Planes]]:
        """Stretches of a table's rows that have room together, to be read, each with its first slot: all at once or so.

        Each is there until the next is asked for.
        """
        size, planes = table.pool.page_size, list(table.pool.planes.values())
        held = np.where(np.arange(table.table.shape[1]) < table.needed[:, None], table.table, -1)
        pages = int(table.needed.max(initial=0))

        def wanted(start: int, stop: int) -> tuple[Blocks, Blocks]:
            some = held[:, start:stop]
            some = some[some >= 0]
            return np.concatenate([NONE, *(self.blocks(plane, some) for plane in planes)]), NONE

        if not pages:
            yield 0, table
        self._last[table.pool] = NONE
        for start, stop in self._in_turn(pages, wanted, table.pool):
            yield start * size, table if stop - start == pages else PageStretch(table, start, stop)

    def appended(self, table: Planes, start: Int[np.ndarray, " R"], count: int) -> Iterator[tuple[int, int]]:
        """Stretches of the `count` tokens that are written behind slot `start[r]` of each row, 1,024 at most.

        A block that rows have filled goes to the disk, once; till then it is written in memory.
        """
        pool, planes = table.pool, list(table.pool.planes.values())
        size, index = pool.page_size, np.arange(table.table.shape[1])

        def wanted(first: int, last: int) -> tuple[Blocks, Blocks]:
            low, high = (start + first) // size, (start + last - 1) // size
            some = table.table[(index >= low[:, None]) & (index <= high[:, None])]
            return NONE, np.concatenate([NONE, *(self.blocks(plane, some) for plane in planes)])

        for first, last in self._in_turn(count, wanted, most=WRITTEN):
            now = np.unique(wanted(first, last)[1])
            self._each(self.residency.clean(np.setdiff1d(self._open.get(pool, NONE), now)), self.file.write_out)
            self._open[pool] = now
            yield first, last

    def settle(self, pool: PagePool) -> None:
        """All that was written of a pool goes to the disk; it stays in memory."""
        for every in self._own(pool):
            self._each(self.residency.clean(every[self.residency.here(every)]), self.file.write_out)

    def holds(self, table: Planes) -> bool:
        """Whether all of a table's pages have room together; then they are there, to be read and written."""
        found = np.concatenate([NONE, *(self.blocks(plane, table.held) for plane in table.pool.planes.values())])
        if len(found) > self.residency.room:
            return False
        self._move(self.residency.use(NONE, written=found))
        return True

    @staticmethod
    def least(pool: PagePool, rows: int) -> int:
        """Bytes that must have room together in the worst case: a page of each of so many rows, wherever they lie."""
        blocks = 0
        for spec in pool.specs.values():
            size = spec.page_nbytes(pool.page_size)
            each = -(-size // UNIT) + (UNIT % size != 0)
            blocks += min(rows * each, -(-max(pool.pages, rows) * size // UNIT))
        return blocks * UNIT

    def _in_turn(
        self, count: int, wanted: Wanted, pool: PagePool | None = None, most: int | None = None
    ) -> Iterator[tuple[int, int]]:
        todo = [(0, count)] if count else []
        while todo:
            start, stop = todo.pop()
            long = most is not None and stop - start > most
            read, written = (NONE, NONE) if long else wanted(start, stop)
            if long or (len(read) + len(written) > self.residency.room and stop - start > 1):
                middle = (start + stop) // 2
                todo += [(middle, stop), (start, middle)]
                continue
            if pool is not None:
                self._last[pool] = np.concatenate([self._last[pool], read])
            self._move(self.residency.use(read, written=written))
            yield start, stop

    # -- what is in memory ---------------------------------------------------------------------------------------

    @property
    def resident_nbytes(self) -> int:
        """Bytes in memory, with what stands beside the planes."""
        return self.residency.resident_nbytes + self.beside_nbytes

    @property
    def beside_nbytes(self) -> int:
        """Bytes of what counts in the limit and lies in no plane: indexes, tables, windows."""
        return sum(self._beside.values())

    def hold(self, owner: Any, nbytes: int) -> None:
        """So much stands beside the planes on `owner`'s account; as long as it lives."""
        if self._beside.get(owner) != nbytes:
            self._beside[owner] = nbytes
            self._move(self.residency.limit(self.nbytes - self.beside_nbytes))

    def sweep(self, pool: PagePool) -> None:
        """Let go of what of a pool's planes is here and was not to be."""
        for every in self._own(pool):
            self._each(every[~self.residency.here(every)], self.file.let_go)

    def _own(self, pool: PagePool) -> Iterator[Blocks]:
        """The blocks of each plane of a pool."""
        for plane in pool.planes.values():
            some = self._ranges.get(plane.data_ptr()) if len(plane) else None
            if some is not None:
                yield np.arange(some.nbytes // UNIT) + some.start // UNIT

    def expect(self, pool: PagePool) -> None:
        """A pool is read next, most likely as it was last: the disk may begin."""
        last = self._last.get(pool, NONE)
        self._each(last[~self.residency.here(last)], self.file.expect)

    def _move(self, moves: Moves) -> None:
        self._each(moves.go, self.file.let_go)
        self._each(moves.back, self.file.write_out)
        self._each(moves.come, self.file.expect)

    def _each(self, blocks: Blocks, do: Callable[[int, int], None]) -> None:
        """Once for each run of blocks, which are in order."""
        if not len(blocks):
            return
        cuts = np.flatnonzero(np.diff(blocks) != 1) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(blocks)], strict=True):
            do(int(blocks[first]) * UNIT, (last - first) * UNIT)


def over(memory: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor over memory that is there while it is. Under torch.inference_mode() too one that is written later on."""
    count = int(np.prod(shape)) * dtype.itemsize
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, count=count).view(dtype).view(tuple(shape))
