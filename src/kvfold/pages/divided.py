"""The bytes of a device that a fast memory has, divided into slots for each layout of pages."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from kvfold.pages.on_host import OnHost
from kvfold.pages.pool import PagePool
from kvfold.pages.slots import Layout, Slots, layout_of
from kvfold.pages.transfer import Transfer

TRANSIT = 32
"""One part in so many of the device's room is for what is on its way there, another for what comes to stand beside."""
LEAST = 1e-9
"""The share of a layout of which there is nothing yet."""
UNEVEN = 1.5
"""Times its share of the slots that a layout may come to want before they are divided anew."""


class Divided(OnHost):
    """At most `nbytes` on a device: one buffer, made at the first token, with the slots of all layouts in it.

    It is made anew, and nothing is in it, where a layout joins, shares have changed, or more stands beside.
    """

    def __init__(self, nbytes: int, device: torch.device, policy: str):
        super().__init__(Transfer(device, max(1, nbytes // TRANSIT)))
        self.nbytes, self.device, self.policy = nbytes, device, policy
        self._layouts: dict[Layout, Slots] = {}
        self._beside: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)

    @property
    def resident_nbytes(self) -> int:
        """Bytes on the device: slots, used or not, what is on its way, and what stands beside."""
        return self._buffer.nbytes + (self.transfer.room if len(self._buffer) else 0) + self.beside_nbytes

    @property
    def beside_nbytes(self) -> int:
        """Bytes of what counts in the limit and lies in no plane: indexes, tables, windows."""
        return sum(self._beside.values())

    @property
    def hits(self) -> int:
        """Pages that were on the device when they were read or written."""
        return sum(some.residency.hits for some in self._layouts.values())

    @property
    def misses(self) -> int:
        """Those that were not."""
        return sum(some.residency.misses for some in self._layouts.values())

    def least(self, pools: Sequence[PagePool], rows: int) -> int:
        """Bytes that must have room together in the worst case: a page of each of so many rows in each pool."""
        layouts = [Slots(layout_of(pool), torch.device("cpu"), self.policy) for pool in pools]
        return self.transfer.room + sum(some.nbytes_of(rows) for some in layouts)

    def hold(self, owner: Any, nbytes: int) -> None:
        """So much stands beside the slots on `owner`'s account; as long as it lives."""
        self._beside[owner] = nbytes
        if len(self._buffer) and self.resident_nbytes > self.nbytes:
            self._divide()

    def settle(self, pool: PagePool) -> None:
        """All that was written of a pool is on the host; slots are where pages are."""
        self._arrive(pool)
        if pool.pages:
            self._slots(pool)  # it may have taken another one's place
        shares = zip(self._layouts.values(), self._shares(), strict=True)
        if any(not 1 / UNEVEN < share / some.share < UNEVEN for some, share in shares if some.share and share):
            self._divide()

    def _slots(self, pool: PagePool, rows: int = 1) -> Slots:
        """Those for a pool's pages, of which one for each of so many rows is wanted at once."""
        layout, some = layout_of(pool), self._of.get(pool)
        if some is None or some.layout != layout:
            if some is not None:
                some.leave(pool)
            some = self._of[pool] = self._layouts.setdefault(layout, Slots(layout, self.device, self.policy))
            some.base(pool)
        some.least = max(some.least, rows)
        if not some.share or (rows > some.residency.capacity and len(self._layouts) > 1):
            self._divide()
        return some

    def _check_fits(self, some: Slots, blocks: int) -> None:
        if blocks > some.residency.room:
            raise ValueError(
                f"fast_memory={self.nbytes} is too little: {blocks} pages of {some.page_nbytes} bytes are read at "
                f"once, and {some.residency.room} have room beside {self.beside_nbytes} bytes of indexes, tables and "
                "windows"
            )

    def _divide(self) -> None:
        """Slots anew: for each layout what it must have, and of the rest its share. Nothing is in them."""
        layouts, room = list(self._layouts.values()), self.nbytes - self.beside_nbytes - self.transfer.room
        least = sum(some.nbytes_of(some.least) for some in layouts)
        room -= min(self.nbytes // TRANSIT, max(0, room - least))  # so that more may come to stand beside
        rest, counts = room - least, list[int]()
        for some, share in zip(layouts, self._shares(), strict=True):
            some.share = max(share, LEAST)
            counts.append(max(0, some.least + int(rest * share) // some.page_nbytes))
        self.transfer.finish(self.transfer.mark())
        for some in layouts:
            some.lay(self._buffer[:0], 0, 0)
        self._buffer = self._buffer[:0].clone()  # what was there is free before there is more
        total = sum(some.nbytes_of(count) for some, count in zip(layouts, counts, strict=True))
        if total > max(0, room):
            counts, total = [0] * len(layouts), 0  # whoever reads says what is missing
        with torch.inference_mode(False):
            self._buffer = torch.empty(total, dtype=torch.uint8, device=self.device)
        start = 0
        for some, count in zip(layouts, counts, strict=True):
            start = some.lay(self._buffer, start, count)

    def _shares(self) -> list[float]:
        """What of all pages' bytes those of each layout are; as much each where there are none."""
        needs = [some.wanted * some.page_nbytes for some in self._layouts.values()]
        every = sum(needs)
        return [need / every if every else 1 / len(needs) for need in needs]
