"""Which blocks are in a fast memory, against a dictionary that says it block by block."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvfold.pages import Residency

BLOCK, KINDS = 10, 12


def blocks(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


class Dictionary:
    """The same by its definition: a dictionary of who is here, looked through from end to end."""

    def __init__(self, capacity: int, policy: str):
        self.capacity, self.policy, self.clock = capacity, policy, 0
        self.here: dict[int, dict[str, Any]] = {}
        self.pins: dict[int, int] = {}
        self.elsewhere: set[int] = set()
        self.hits = self.misses = self.brought = self.written = 0

    def worth(self, block: int) -> tuple[float, ...]:
        one = self.here[block]
        own = {"lru": (one["at"],), "lfu": (one["uses"], -one["at"]), "score": (one["score"], one["at"])}[self.policy]
        return one["dirty"], *own

    def leave(self, count: int, spared: set[int]) -> tuple[list[int], list[int]]:
        able = sorted((b for b in self.here if not self.pins.get(b) and b not in spared), key=self.worth)
        go = sorted(able[: max(0, count)])
        back = self.clean(go)
        for block in go:
            del self.here[block]
        return go, back

    def clean(self, blocks: list[int]) -> list[int]:
        back = [block for block in blocks if self.here[block]["dirty"]]
        for block in back:
            self.here[block]["dirty"] = False
        self.elsewhere |= set(back)
        self.written += len(back)
        return back

    def use(
        self, read: list[int], written: list[int], score: float, ahead: bool = False
    ) -> tuple[list[int], list[int], list[int]] | None:
        every = sorted(set(read) | set(written))
        if len(set(every) | {b for b, n in self.pins.items() if n}) > self.capacity:
            return None
        new = [block for block in every if block not in self.here]
        self.hits += sum(not self.here[b]["early"] for b in every if b not in new) if not ahead else 0
        self.misses += len(new)
        fresh = {b: {"at": 0, "uses": 0, "score": 0.0, "dirty": False, "early": ahead} for b in new}
        for place, block in enumerate(every):
            one = fresh.get(block) or self.here[block]
            one["at"], one["uses"], one["score"] = self.clock + place, one["uses"] + (not ahead), score
            one["early"] = one["early"] and ahead
        self.clock += len(every)
        go, back = self.leave(len(self.here) + len(new) - self.capacity, set(every))
        self.here |= fresh
        for block in written:
            self.here[block]["dirty"] = True
        come = [block for block in new if block in self.elsewhere]
        self.brought += len(come)
        return come, go, back


class Residents(RuleBasedStateMachine):
    """Any order of uses, pins, limits and ends of blocks."""

    @initialize(capacity=st.integers(0, 8), policy=st.sampled_from(["lru", "lfu", "score"]))
    def start(self, capacity, policy):
        self.known, self.real = Dictionary(capacity, policy), Residency(capacity * BLOCK + BLOCK - 1, BLOCK, policy)

    numbers = st.lists(st.integers(0, KINDS - 1), max_size=6)

    @rule(read=numbers, written=numbers, score=st.sampled_from([0.0, 1.0, 2.0]), ahead=st.booleans())
    def use(self, read, written, score, ahead):
        written = [] if ahead else written
        expected = self.known.use(read, written, score, ahead)
        before = self.real.here(np.arange(KINDS)).tolist(), self.real.hits, self.real.written_nbytes
        try:
            moves = self.real.use(blocks(*read), written=blocks(*written), score=score, ahead=ahead)
        except ValueError as error:
            assert expected is None and "can be had" in str(error)
            assert before == (self.real.here(np.arange(KINDS)).tolist(), self.real.hits, self.real.written_nbytes)
            return
        assert expected == tuple(each.tolist() for each in moves)

    @rule(data=st.data())
    def pin(self, data):
        """What is being read stays; and it is let go of as often as it was held."""
        if self.known.here and data.draw(st.booleans()):
            block = data.draw(st.sampled_from(sorted(self.known.here)))
            self.known.pins[block] = self.known.pins.get(block, 0) + 1
            self.real.pin(blocks(block))
        elif pinned := sorted(b for b, n in self.known.pins.items() if n):
            block = data.draw(st.sampled_from(pinned))
            self.known.pins[block] -= 1
            self.real.unpin(blocks(block))

    @rule(numbers=numbers)
    def forget(self, numbers):
        gone = [block for block in numbers if not self.known.pins.get(block)]
        self.real.forget(blocks(*sorted(set(gone))))
        for block in gone:
            self.known.here.pop(block, None)
            self.known.elsewhere.discard(block)

    @rule(numbers=numbers)
    def clean(self, numbers):
        some = sorted(set(numbers) & set(self.known.here))
        assert self.real.clean(blocks(*some)).tolist() == self.known.clean(some)

    @rule(capacity=st.integers(0, 8))
    def limit(self, capacity):
        if sum(n > 0 for n in self.known.pins.values()) > capacity:
            with pytest.raises(ValueError, match="are pinned"):
                self.real.limit(capacity * BLOCK)
            return
        self.known.capacity = capacity
        expected = self.known.leave(len(self.known.here) - capacity, set())
        _, go, back = self.real.limit(capacity * BLOCK)
        assert (go.tolist(), back.tolist()) == expected

    @invariant()
    def holds_who_is_here(self):
        if not hasattr(self, "real"):
            return
        here = np.flatnonzero(self.real.here(np.arange(KINDS))).tolist()
        assert here == sorted(self.known.here) and len(here) <= self.real.capacity == self.known.capacity
        assert self.real.resident_nbytes == len(here) * BLOCK
        assert {b for b, n in self.known.pins.items() if n} <= set(here)
        assert (self.real.hits, self.real.misses) == (self.known.hits, self.known.misses)
        assert self.real.brought_nbytes == self.known.brought * BLOCK
        assert self.real.written_nbytes == self.known.written * BLOCK


TestResidents = Residents.TestCase


def test_a_new_block_is_written_once_and_a_clean_one_never():
    some = Residency(2 * BLOCK, BLOCK)
    assert not len(some.use(blocks(), written=blocks(0, 1)).come)  # they are made here: nothing is copied
    assert some.use(blocks(2)).back.tolist() == [0]
    for _ in range(3):  # 1 goes back once, then all of them are read and go
        some.use(blocks(0, 1))
        some.use(blocks(2, 3))
    assert some.written_nbytes == 2 * BLOCK
    some.use(blocks(0), written=blocks(1))
    assert some.use(blocks(2)).go.tolist() == [0]  # 1 is older by far, and would have to be copied
    assert some.clean(blocks(1)).tolist() == [1] and not len(some.clean(blocks(1)))
    assert some.use(blocks(3)).go.tolist() == [1] and some.written_nbytes == 3 * BLOCK


def test_a_walk_through_more_than_fits_keeps_most_of_what_is_here():
    hits = {}
    for policy in ("lru", "lfu"):
        some = Residency(4 * BLOCK, BLOCK, policy)
        for _ in range(10):
            for block in range(16):
                some.use(blocks(block))
        hits[policy] = some.hits
    assert hits == {"lru": 0, "lfu": 9 * 3}


def test_counts_of_uses_are_halved_before_they_are_too_many():
    some = Residency(2 * BLOCK, BLOCK, "lfu")
    for _ in range(20000):
        some.use(blocks(0))
    for _ in range(3):
        some.use(blocks(1))
    assert some.use(blocks(2)).go.tolist() == [1]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((10, 0), "block_nbytes=0"), ((-1, 10), "nbytes=-1"), ((True, 10), "nbytes=True"), ((1.5, 10), "nbytes=1.5"),
        ((10, 10, "mru"), "policy='mru'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_what_it_can_not_be_is_refused(given, named):
    with pytest.raises(ValueError, match=named):
        Residency(*given)
