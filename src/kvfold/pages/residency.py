"""Which blocks are in a fast memory that has no room for all: who comes, who goes, and what was moved.

A block is a number; what it is, and where it lies when it is not here, others know: a cache on disk, a scheduler.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

Blocks = Int[np.ndarray, " _"]
NONE: Blocks = np.zeros(0, dtype=np.int64)
OFTEN = 1 << 14
"""Uses that are counted of a block; whoever has as many has all counts halved."""
LATEST = 1 << 48
"""More uses than there will be."""


class Moves(NamedTuple):
    """What a use asks for: `back` is copied to where it lies otherwise, `go` goes, then `come` is copied."""

    come: Blocks
    """Those that are to be copied here; what was never elsewhere is just written."""
    go: Blocks
    back: Blocks
    """Those of `go` that were written since they came."""


class Residency:
    """At most `nbytes` in blocks of `block_nbytes`; `policy` says who goes where room is wanted.

    "lru": who was not used for longest. "lfu": who was used least often since it came, of those the latest, so that a
    walk through more blocks than fit leaves most of what is here alone. "score": who has the least score, of those the
    longest not used. A block that is pinned, or that is being used, never goes. One that was not written since it came
    goes without being copied back, and so before all that were. Raises ValueError for anything else.
    """

    def __init__(self, nbytes: int, block_nbytes: int, policy: str = "lru"):
        if policy not in POLICIES:
            raise ValueError(f"policy={policy!r} must be one of {', '.join(map(repr, POLICIES))}")
        for name, given, low in (("nbytes", nbytes, 0), ("block_nbytes", block_nbytes, 1)):
            size: object = given
            if not isinstance(size, int) or isinstance(size, bool) or size < low:
                raise ValueError(f"{name}={size!r} must be an int >= {low}")
        self.block_nbytes, self.policy = block_nbytes, policy
        self.capacity = nbytes // block_nbytes  # blocks
        self.hits = self.misses = 0  # blocks that were here when they were used, and those that were not
        self.brought_nbytes = self.written_nbytes = 0
        # known: it lies elsewhere, too; early: it came ahead, and was not read since
        self._here = self._dirty = self._known = self._early = np.zeros(0, dtype=bool)
        self._pins = np.zeros(0, dtype=np.int32)
        self._at = self._uses = np.zeros(0, dtype=np.int64)
        self._score = np.zeros(0)
        self._clock = self._count = 0

    @property
    def resident_nbytes(self) -> int:
        """Bytes of the blocks that are here."""
        return self._count * self.block_nbytes

    @property
    def room(self) -> int:
        """Blocks that one use may ask for: all but those that are pinned."""
        return self.capacity - int((self._pins > 0).sum())

    def here(self, blocks: Blocks) -> Bool[np.ndarray, " _"]:
        """Which of them are here."""
        found: np.ndarray = np.zeros(len(blocks), dtype=bool)
        some = blocks < len(self._here)
        found[some] = self._here[blocks[some]]
        return found

    def use(self, blocks: Blocks, *, written: Blocks | None = None, score: float = 0.0, ahead: bool = False) -> Moves:
        """These are about to be read, and `written` (some of them, or others) written: what that asks for.

        `ahead`: they are only expected to be read. Who comes so is a miss, and no hit when it is read.
        Raises ValueError, and changes nothing, where they are more than there is room for.
        """
        every = np.unique(blocks if written is None else np.concatenate([blocks, written]))
        if not len(every):
            return Moves(every, every, every)
        self._reach(int(every[-1]) + 1)
        held = self._here[every]
        pinned = int((self._pins > 0).sum()) - int((self._pins[every] > 0).sum())
        if len(every) > self.capacity - pinned:
            raise ValueError(
                f"{len(every)} blocks of {self.block_nbytes} bytes are wanted at once; {self.capacity - pinned} of "
                f"{self.capacity} can be had"
            )
        self.hits += 0 if ahead else int((held & ~self._early[every]).sum())
        self.misses += int((~held).sum())
        self._early[every] = ahead & (~held | self._early[every])
        self._at[every] = self._clock + np.arange(len(every))
        self._clock += len(every)
        self._uses[every] = np.where(held, self._uses[every], 0) + (not ahead)
        if int(self._uses[every].max()) >= OFTEN:
            self._uses //= 2
        self._score[every] = score
        come, spared = every[~held], every[held]
        go, back = self._leave(self._count + len(come) - self.capacity, spared)
        self._here[come] = True
        self._count += len(come)
        self.brought_nbytes += int(self._known[come].sum()) * self.block_nbytes
        if written is not None:
            self._dirty[written] = True
        return Moves(come[self._known[come]], go, back)

    def limit(self, nbytes: int) -> Moves:
        """So much from now on: who goes for it. Raises ValueError, and changes nothing, where more is pinned."""
        capacity, pinned = max(0, nbytes) // self.block_nbytes, self.capacity - self.room
        if capacity < pinned:
            raise ValueError(f"nbytes={nbytes} is {capacity} blocks of {self.block_nbytes}, and {pinned} are pinned")
        self.capacity = capacity
        none = np.zeros(0, dtype=np.int64)
        go, back = self._leave(self._count - capacity, none)
        return Moves(none, go, back)

    def pin(self, blocks: Blocks) -> None:
        """These are being read, and stay until they are unpinned as often. They must be here."""
        assert bool(self.here(blocks).all()), "only what is here can be pinned"
        np.add.at(self._pins, blocks, 1)

    def unpin(self, blocks: Blocks) -> None:
        """See `pin`."""
        np.subtract.at(self._pins, blocks, 1)
        assert not len(blocks) or int(self._pins[blocks].min()) >= 0, "a block was unpinned more often than pinned"

    def clean(self, blocks: Blocks) -> Blocks:
        """Those of them that were written since they came are copied back now, whether or not they go: which."""
        back: np.ndarray = blocks[self._dirty[blocks]]
        self.written_nbytes += len(back) * self.block_nbytes
        self._dirty[back], self._known[back] = False, True
        return back

    def forget(self, blocks: Blocks) -> None:
        """What these held is of no use any more: they are nowhere. None may be pinned."""
        some = blocks[blocks < len(self._here)]
        assert not self._pins[some].any(), "a pinned block is in use"
        self._count -= int(self._here[some].sum())
        self._here[some] = self._dirty[some] = self._known[some] = False

    def renumber(self, before: Blocks, after: Blocks) -> None:
        """Each block has another number from now on, which no block has that is here; its old one is free."""
        if len(before):
            self._reach(int(max(before.max(), after.max())) + 1)
            for array in self._all():
                array[after] = array[before]
                array[before] = 0

    def _leave(self, count: int, spared: Blocks) -> tuple[Blocks, Blocks]:
        """`count` blocks (none if negative) go, but no pinned one and none of `spared`; of those the written ones."""
        none = np.zeros(0, dtype=np.int64)
        if count <= 0:
            return none, none
        may = self._here & (self._pins == 0)
        may[spared] = False
        go = none
        for able in (np.flatnonzero(may & ~self._dirty), np.flatnonzero(may & self._dirty)):
            if len(go) < count:
                go = np.concatenate([go, able[POLICIES[self.policy](self, able)[: count - len(go)]]])
        go = np.sort(go)
        back = self.clean(go)
        self._here[go] = False
        self._count -= len(go)
        return go, back

    def _reach(self, blocks: int) -> None:
        """Room for blocks up to this number."""
        more = max(0, blocks - len(self._here))
        if more:
            more += len(self._here) // 4
            padded = [np.pad(x, (0, more)) for x in self._all()]
            self._here, self._dirty, self._known, self._early, self._pins, self._at, self._uses, self._score = padded

    def _all(self) -> tuple[np.ndarray, ...]:
        """What is known of blocks, by their numbers."""
        flags = self._here, self._dirty, self._known, self._early
        return *flags, self._pins, self._at, self._uses, self._score

    def oldest(self, blocks: Blocks) -> Blocks:
        """Their order under "lru", who goes first in front."""
        return np.argsort(self._at[blocks], kind="stable")

    def rarest(self, blocks: Blocks) -> Blocks:
        """Their order under "lfu"."""
        return np.argsort(self._uses[blocks] * LATEST - self._at[blocks], kind="stable")

    def lowest(self, blocks: Blocks) -> Blocks:
        """Their order under "score"."""
        return np.lexsort((self._at[blocks], self._score[blocks]))


POLICIES: dict[str, Callable[[Residency, Blocks], Blocks]] = {
    "lru": Residency.oldest, "lfu": Residency.rarest, "score": Residency.lowest,
}  # fmt: skip
