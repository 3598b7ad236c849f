"""Slots for pages of one layout in a device's memory: which pages have one, and what of them is up to date there."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.pages.pool import PagePool
from kvfold.pages.ranges import Ranges
from kvfold.pages.residency import Blocks, Residency
from kvfold.pages.storage import Plane, Storage
from kvfold.pages.transfer import Transfer

ALIGNED = 64
"""Bytes at whose multiples planes begin."""
ROOM = 2
"""Times its pages that a pool has numbers for."""
Layout = tuple[int, tuple[tuple[str, Plane], ...]]
"""Tokens of a page, and its planes by name: pages of one layout can take each other's place."""


def layout_of(pool: PagePool) -> Layout:
    """The layout of a pool's pages, as it is now."""
    return pool.page_size, tuple(sorted(pool.specs.items()))


@dataclass
class Numbers:
    """So many numbers from one on."""

    start: int
    room: int


class Slots:
    """`store` has the slots, page by page; a block is a page of a pool, whose number there is `base` of it and its own.

    A slot that holds an old version of some planes of its page is `stale` in those. Nothing here is ever copied back:
    what is written is written to the pool, too.
    """

    def __init__(self, layout: Layout, device: torch.device, policy: str):
        self.layout, self.policy = layout, policy
        self.store = Storage(dict(layout[1]), device, layout[0])
        self.page_nbytes = sum(spec.page_nbytes(layout[0]) for _, spec in layout[1])
        self.least = 1  # blocks that are wanted together in any case
        self.share = 0.0  # of all that could be here, when slots were divided
        self._numbers: weakref.WeakKeyDictionary[PagePool, Numbers] = weakref.WeakKeyDictionary()
        self._ranges = Ranges()  # of numbers
        self._gone = list[Numbers]()  # those of pools that are no more
        self.residency = Residency(0, self.page_nbytes, policy)
        self._clear(0)

    def _clear(self, count: int) -> None:
        before = self.residency
        self.residency = Residency(count * self.page_nbytes, self.page_nbytes, self.policy)
        self.residency.hits, self.residency.misses = before.hits, before.misses
        self._at: np.ndarray = np.full(self._ranges.top, -1, dtype=np.int32)  # the slot of each block
        self._free = list(range(count - 1, -1, -1))
        self._stale: np.ndarray = np.zeros((len(self.layout[1]), count), dtype=bool)

    def nbytes_of(self, count: int) -> int:
        """Bytes of so many slots."""
        return count * self.page_nbytes + ALIGNED * len(self.layout[1])

    def lay(self, buffer: Tensor, start: int, count: int) -> int:
        """So many slots in a buffer of bytes, from `start` on, and nothing in them; where they end."""
        with torch.inference_mode(False):  # slots are written outside, too
            for name, spec in self.layout[1]:
                size = spec.page_nbytes(self.layout[0]) * count
                shape = spec.shape(count, self.layout[0])
                self.store.planes[name] = buffer[start : start + size].view(spec.dtype).view(shape)
                start += -(-size // ALIGNED) * ALIGNED
        self._clear(count)
        return start

    @property
    def wanted(self) -> int:
        """Pages that could be here."""
        return sum(pool.pages for pool in self._numbers)

    def base(self, pool: PagePool) -> int:
        """The number of the block that a pool's first page is."""
        self._tidy()
        numbers = self._numbers.get(pool)
        if numbers is None:
            numbers = self._numbers[pool] = Numbers(0, 0)
            weakref.finalize(pool, self._gone.append, numbers).atexit = False
        if numbers.room < max(1, pool.pages):
            before = np.arange(numbers.start, numbers.start + numbers.room)
            made = self._take(ROOM * max(1, pool.pages))
            after = made.start + np.arange(numbers.room)
            self.residency.renumber(before, after)
            self._at[after] = self._at[before]
            self._free_numbers(numbers)
            numbers.start, numbers.room = made.start, made.room
        return numbers.start

    def leave(self, pool: PagePool) -> None:
        """A pool's pages are of another layout now."""
        numbers = self._numbers.pop(pool, None)
        if numbers is not None:
            self._gone.append(numbers)

    def _take(self, room: int) -> Numbers:
        made = Numbers(self._ranges.take(room), room)
        self._at = np.pad(self._at, (0, self._ranges.top - len(self._at)), constant_values=-1)
        return made

    def _free_numbers(self, numbers: Numbers) -> None:
        """They are nobody's."""
        self._at[numbers.start : numbers.start + numbers.room] = -1
        self._ranges.give_back(numbers.start, numbers.room)

    def _tidy(self) -> None:
        """Numbers of pools that are gone are free; Python may have collected those at any moment."""
        while self._gone:
            numbers = self._gone.pop()
            blocks = np.arange(numbers.start, numbers.start + numbers.room)
            self.residency.forget(blocks)
            self._leave(blocks)
            self._free_numbers(numbers)
            numbers.room = 0  # a pool may have left before it went

    def _leave(self, blocks: Blocks) -> None:
        slots = self._at[blocks]
        self._free.extend(slots[slots >= 0].tolist())
        self._at[blocks] = -1

    # -- what is here --------------------------------------------------------------------------------------------

    def at(self, blocks: Int[np.ndarray, "*_"]) -> Int[np.ndarray, "*_"]:
        """The slot of each block, -1 where it has none."""
        found: np.ndarray = self._at[blocks]
        return found

    def place(self, blocks: Blocks, fresh: Blocks | None = None, *, ahead: bool = False) -> Int[np.ndarray, " _"]:
        """The slots of blocks, each given once, which are here then; those of `fresh` (some of them) hold nothing yet.

        What the others hold may be stale: see `freshen`. `ahead`: as for `Residency.use`, which raises ValueError
        where there is no room.
        """
        moves = self.residency.use(blocks, ahead=ahead)
        assert not len(moves.back), "what is here was written where it comes from, too"
        self._leave(moves.go)
        new = blocks[self._at[blocks] < 0]
        if len(new):
            slots = self._free[-len(new) :]
            del self._free[-len(new) :]
            self._at[new] = slots
            self._stale[:, slots] = True
        if fresh is not None and len(fresh):
            slots = self._at[fresh]
            here = torch.from_numpy(slots.astype(np.int64)).to(self.store.device)
            for name, spec in self.layout[1]:
                self.store.planes[name][here] = spec.fill
            self._stale[:, slots] = False
        found: np.ndarray = self._at[blocks]
        return found

    def spoil(self, names: set[str], blocks: Blocks) -> None:
        """Those planes of blocks were written where they come from: what is here of them is stale."""
        slots = self._at[blocks]
        slots = slots[slots >= 0]
        for i, (name, _) in enumerate(self.layout[1]):
            if name in names:
                self._stale[i, slots] = True

    def freshen(self, transfer: Transfer, planes: Mapping[str, Tensor], pages: np.ndarray, slots: np.ndarray) -> None:
        """Whatever is stale in `slots`, where pages of `planes` are, is copied."""
        old = self._stale[:, slots]
        if not old.any():
            return
        for stale, (name, _) in zip(old, self.layout[1], strict=True):
            if stale.any():
                transfer.up(self.store.planes[name], slots[stale], planes[name], pages[stale])
        self._stale[:, slots] = False

    def stale_in(self, slots: np.ndarray) -> np.ndarray:
        """Which of them `freshen` would copy something to."""
        found: np.ndarray = np.logical_or.reduce(self._stale[:, slots])
        return found
