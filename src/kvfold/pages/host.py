"""Planes that lie on the host, and slots for some of their pages in the memory of the device that reads them."""

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.pages.divided import Divided
from kvfold.pages.few import FewPages, ReadPages
from kvfold.pages.on_host import Arriving
from kvfold.pages.planes import Planes
from kvfold.pages.pool import PagePool
from kvfold.pages.residency import Blocks
from kvfold.pages.slots import Slots
from kvfold.pages.storage import Plane
from kvfold.pages.stretch import PageStretch
from kvfold.pages.turns import in_turn

WRITTEN = 1024
"""Tokens of a row that are written at once."""


class HostMemory(Divided):
    """At most `nbytes` on `device`: slots for pages whose planes lie on the host, and what stands beside.

    What is written on the device is written to the host, too, once and on the side; so a page that must go is never
    copied back. Kernels that attend read slots; whoever gathers and scatters tokens does so on the host. Slots are made
    at the first token, and `policy` (see `Residency`) says which pages have one. All caches that share pages share one
    of these. On the CPU, where device and host are one memory, pages are copied and counted all the same.
    """

    def __init__(self, nbytes: int, device: torch.device, policy: str = "lfu"):
        super().__init__(nbytes, device, policy)
        self._last: weakref.WeakKeyDictionary[PagePool, np.ndarray] = weakref.WeakKeyDictionary()  # read, and again
        self._ready: Any = None  # when what is on its way is there

    def in_turn(
        self, table: Planes, read: Tensor | None = None, *, shares: bool = False
    ) -> Iterator[tuple[Planes, Tensor | None]]:
        """Stretches of a table's rows that have room together, as tables of slots, each with its part of `read`.

        Each is there until the next is asked for. All at once where that has room. Pages of which `read` marks nothing
        don't come, unless `shares`: then each slot is given its own. Raises ValueError where a page of each row has no
        room.
        """
        if read is not None and not shares:
            asked = ReadPages(table, read.flatten(0, 1).numpy(force=True))
            read, table = torch.from_numpy(asked.marks).to(read.device).view(*read.shape[:2], -1), asked
        pool, size, pages = table.pool, table.pool.page_size, table.table.shape[1]
        some = self._slots(pool, 1 if isinstance(table, FewPages) else table.rows)
        base = some.base(pool)
        filled = np.arange(pages) * size < table.lengths[:, None]

        def wanted(start: int, stop: int) -> Blocks:
            return base + np.unique(table.table[:, start:stop][filled[:, start:stop]])

        if not pages:  # nothing of it is read
            none = np.full((len(table.table), 0), -1, dtype=np.int32)
            yield PageStretch(table, 0, 0, some.store, none), None if read is None else read[..., :0]
            return
        first = True
        for start, stop, blocks in in_turn(pages, wanted, lambda: some.residency.room):
            self._check_fits(some, len(blocks))
            self._bring(some, pool, blocks)
            if first:
                self._last[pool] = blocks[:0] if isinstance(table, FewPages | ReadPages) else blocks - base
                first = False
            numbers = np.full((len(table.table), stop - start), -1, dtype=np.int32)
            inside = filled[:, start:stop]
            numbers[inside] = some.at(base + table.table[:, start:stop][inside])
            part = PageStretch(table, start, stop, some.store, numbers)
            if part.longest or (start, stop) == (0, pages):
                at = start * size
                yield part, None if read is None else read[..., at : at + part.longest]

    def appended(
        self, table: Planes, start: Int[np.ndarray, " R"], count: int, planes: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, int]]:
        """The `count` tokens behind slot `start[r]` of each row, `planes` (R, count, ...), are written here.

        They go to slots on the device and from there to the host. What is left to the caller: nothing; where something
        is held once for a page, all.
        """
        pool, size = table.pool, table.pool.page_size
        if pool.per_page:
            pages = table.table[np.arange(table.rows)[:, None], (start[:, None] + np.arange(count)) // size]
            self.wrote(pool, pool.specs, pages)
            yield 0, count
            return
        some = self._slots(pool, table.rows)
        base = some.base(pool)
        self._arrive(pool)  # the last token's are there since long

        def place(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
            slots = start[:, None] + np.arange(first, last)
            return table.table[np.arange(table.rows)[:, None], slots // size], slots % size

        def wanted(first: int, last: int) -> Blocks:
            return base + np.unique(place(first, last)[0])

        for first, last, blocks in in_turn(count, wanted, lambda: some.residency.room, WRITTEN):
            pages, offsets = place(first, last)
            new = {
                name: self._new(spec, planes.get(name), table.rows, first, last) for name, spec in pool.specs.items()
            }
            if len(blocks) <= some.residency.room:
                self._bring(some, pool, blocks, base + np.unique(pages[offsets == 0]))
                here, at = (self.transfer.numbers(x.reshape(-1)) for x in (some.at(base + pages), offsets))
                for name, numbers in new.items():
                    some.store.planes[name][here, at] = numbers
            else:
                some.spoil(set(new), blocks)
            ids, at = (torch.from_numpy(x.reshape(-1).astype(np.int64)) for x in (pages, offsets))
            down = {name: self.transfer.down(numbers) for name, numbers in new.items()}
            self._pending.setdefault(pool, []).append(Arriving(self.transfer.mark(), ids, at, down))
            if count > 1:  # what waits is memory, too
                self._arrive(pool)
        yield from ()

    def fetch(self, pool: PagePool) -> None:
        """A pool is read next: of what is surely read, as it was last, what is not here is on its way.

        That is where everything was read: a choice may be another one.
        """
        pages = self._last.get(pool)
        if pages is None or not len(pages):
            return
        pages = pages[pages < pool.pages]
        pages = pages[pool.refs[pages] > 0]
        some = self._slots(pool)
        base, room = some.base(pool), some.residency.room
        self._bring(some, pool, base + pages[:room], ahead=True)

    def _bring(
        self, some: Slots, pool: PagePool, blocks: Blocks, fresh: Blocks | None = None, *, ahead: bool = False
    ) -> None:  # fmt: skip
        """Blocks of a pool are on the device, and up to date; what computes waits for that, unless it is `ahead`."""
        if not ahead:  # a slot that is given to somebody else may be one that something is on its way to
            self._await()
        slots, pages = some.place(blocks, fresh, ahead=ahead), blocks - some.base(pool)
        old = pages[some.stale_in(slots)]
        if not len(old):
            return
        if any(np.isin(old, each.pages.numpy()).any() for each in self._pending.get(pool, ())):
            self._arrive(pool)
        some.freshen(self.transfer, pool.planes, pages, slots)
        self._ready = self.transfer.mark()
        if not ahead:
            self._await()

    def _await(self) -> None:
        """What computes waits for what is on its way."""
        self.transfer.wait(self._ready)
        self._ready = None

    def _new(self, spec: Plane, given: Tensor | None, rows: int, first: int, last: int) -> Tensor:
        """Tokens `first` to `last` of each row as a plane has them, (R * N, ...)."""
        if given is None:
            wide = () if spec.width is None else (spec.width,)
            return torch.full((rows * (last - first), *wide), spec.fill, dtype=spec.dtype, device=self.device)
        return given[:, first:last].flatten(0, 1).to(self.device, spec.dtype)

    def sweep(self, pool: PagePool) -> None:
        """Nothing is here that was not to be."""

    def expect(self, pool: PagePool) -> None:
        """A layer is about to be read, and then this pool: what is fetched now could take that layer's room."""
