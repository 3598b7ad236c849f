"""Planes that lie in a file, and as much of them in memory as is allowed: who touches them says so first."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from kvfold.pages.in_file import InFile
from kvfold.pages.planes import Planes
from kvfold.pages.pool import PagePool
from kvfold.pages.residency import NONE, Blocks, Moves, Residency
from kvfold.pages.spill import UNIT, SpillFile
from kvfold.pages.storage import copy_pages
from kvfold.pages.stretch import PageStretch
from kvfold.pages.turns import in_turn

WRITTEN = 1024
"""Tokens of a row that are written at once: kernels take them in copies, which are memory, too."""
Wanted = Callable[[int, int], tuple[Blocks, Blocks]]
"""The blocks that a stretch reads, and those that it writes."""


class FastMemory(InFile):
    """At most `nbytes` in memory: of the planes that are made here, in `file`, and of what stands beside.

    A plane's bytes are the process's from the moment when they are touched until their room is wanted for others. What
    is read without a word is let go of by the next `sweep`. All caches that share pages share one of these.
    """

    def __init__(self, nbytes: int, file: SpillFile, policy: str = "lfu"):
        super().__init__(file, Residency(nbytes, UNIT, policy))
        self.nbytes = nbytes
        self._beside: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._last: weakref.WeakKeyDictionary[PagePool, Blocks] = weakref.WeakKeyDictionary()  # what was read
        self._whole: weakref.WeakKeyDictionary[PagePool, tuple[np.ndarray, list[int], Blocks]] = (
            weakref.WeakKeyDictionary()
        )  # the blocks of a table that was read at once
        self._open: weakref.WeakKeyDictionary[PagePool, Blocks] = weakref.WeakKeyDictionary()  # where rows end

    # -- who touches what ----------------------------------------------------------------------------------------

    def copy(self, made: Tensor, ids: np.ndarray, known: Tensor, origin: np.ndarray) -> None:
        """Entries `ids` of a plane get those at `origin` of another, a stretch after the other."""

        def wanted(start: int, stop: int) -> tuple[Blocks, Blocks]:
            return self.blocks(known, origin[start:stop]), self.blocks(made, ids[start:stop])

        for start, stop in self._in_turn(len(ids), wanted):
            copy_pages(made, ids[start:stop], known, origin[start:stop])

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

    def in_turn(
        self, table: Planes, read: Tensor | None = None, *, shares: bool = False
    ) -> Iterator[tuple[Planes, Tensor | None]]:
        """Stretches of a table's rows that have room together, each with its part of `read`: all at once or so.

        `shares`: whoever asks wants to know what each slot got. Each is there until the next is asked for.
        """
        size, planes = table.pool.page_size, list(table.pool.planes.values())
        held, pages, whole = table.table, table.table.shape[1], self._whole.get(table.pool)

        def wanted(start: int, stop: int) -> tuple[Blocks, Blocks]:
            nonlocal whole
            if stop - start == pages and whole is not None and whole[0] is held and whole[1] == addresses:
                return whole[2], NONE
            some = held[:, start:stop]
            some = some[some >= 0]
            found = np.concatenate([NONE, *(self.blocks(plane, some) for plane in planes)])
            if stop - start == pages:  # a table has another array as soon as it has other pages
                self._whole[table.pool] = whole = held, addresses, found
            return found, NONE

        addresses = [plane.data_ptr() for plane in planes]
        if not pages:
            yield table, read
        self._last[table.pool] = NONE
        for start, stop in self._in_turn(pages, wanted, table.pool):
            part = table if stop - start == pages else PageStretch(table, start, stop)
            if part.longest or part is table:  # else room that no token has taken yet
                at = start * size
                yield part, None if read is None else read[..., at : at + part.longest]

    def appended(
        self, table: Planes, start: Int[np.ndarray, " R"], count: int, planes: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, int]]:
        """Stretches of the `count` tokens that the caller writes behind slot `start[r]` of each row, 1,024 at most.

        A block that rows have filled goes to the disk, once; till then it is written in memory.
        """
        pool, mine = table.pool, list(table.pool.planes.values())
        size, index = pool.page_size, np.arange(table.table.shape[1])

        now = NONE

        def wanted(first: int, last: int) -> tuple[Blocks, Blocks]:
            nonlocal now
            low, high = (start + first) // size, (start + last - 1) // size
            some = table.table[(index >= low[:, None]) & (index <= high[:, None])]
            now = np.concatenate([NONE, *(self.blocks(plane, some) for plane in mine)])
            return NONE, now

        for first, last in self._in_turn(count, wanted, most=WRITTEN):
            before, self._open[pool] = self._open.get(pool, NONE), now
            if not np.array_equal(before, now):
                self._clean(np.setdiff1d(before, now))
            yield first, last

    def settle(self, pool: PagePool) -> None:
        """All that was written of a pool goes to the disk; it stays in memory."""
        for every in self._own(pool):
            self._clean(every[self.residency.here(every)])

    def holds(self, table: Planes) -> bool:
        """Whether all of a table's pages have room together; then they are there, to be read and written."""
        found = np.concatenate([NONE, *(self.blocks(plane, table.held) for plane in table.pool.planes.values())])
        if len(found) > self.residency.room:
            return False
        self._use(NONE, found)
        return True

    @staticmethod
    def least(pools: Sequence[PagePool], rows: int) -> int:
        """Bytes that must have room together in the worst case: a page of each of so many rows, in some pool of these.

        Wherever they lie.
        """
        return max((FastMemory._least(pool, rows) for pool in pools), default=0)

    @staticmethod
    def _least(pool: PagePool, rows: int) -> int:
        blocks = 0
        for spec in pool.specs.values():
            size = spec.page_nbytes(pool.page_size)
            each = -(-size // UNIT) + (UNIT % size != 0)
            blocks += min(rows * each, -(-max(pool.pages, rows) * size // UNIT))
        return blocks * UNIT

    def _in_turn(
        self, count: int, wanted: Wanted, pool: PagePool | None = None, most: int | None = None
    ) -> Iterator[tuple[int, int]]:
        every = dict[tuple[int, int], tuple[Blocks, Blocks]]()

        def both(start: int, stop: int) -> Blocks:
            every[start, stop] = wanted(start, stop)
            return np.concatenate(every[start, stop])

        for start, stop, _ in in_turn(count, both, lambda: self.residency.room, most):
            read, written = every.pop((start, stop))
            if pool is not None:
                self._last[pool] = np.concatenate([self._last[pool], read])
            self._use(read, written)
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
            with self._undisturbed() as residency:
                moves = residency.limit(self.nbytes - self.beside_nbytes)
            self._move(moves)

    def sweep(self, pool: PagePool) -> None:
        """Let go of what of a pool's planes is here and was not to be."""
        for every in self._own(pool):
            self._each(every[~self.residency.here(every)], self.file.let_go)

    def fetch(self, pool: PagePool) -> None:
        """A pool is read next: the disk has begun, see `expect`."""

    def expect(self, pool: PagePool) -> None:
        """A pool is read next, most likely as it was last: the disk may begin."""
        last = self._last.get(pool, NONE)
        self._each(last[~self.residency.here(last)], self.file.expect)

    def _use(self, read: Blocks, written: Blocks) -> None:
        with self._undisturbed() as residency:
            moves = residency.use(read, written=written)
        self._move(moves)

    def _clean(self, blocks: Blocks) -> None:
        with self._undisturbed() as residency:
            back = residency.clean(blocks)
        self._each(back, self.file.write_out)

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
