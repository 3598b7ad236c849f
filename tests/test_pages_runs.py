"""Pages in runs: what an allocator hands out, and where rows lie after they have come and gone for long."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.pages import Arena, OutOfPages, PagePool, PageTable, Plane, memory
from kvfold.pages.memory import HUGE, blank, huge_pages
from kvfold.pages.pool import ALLOWED
from kvfold.pages.runs import RUN_BYTES, blocks, broken, laid, place, stretches

CPU, PAGE = torch.device("cpu"), 4
PLANES = {"keys": Plane(256, torch.float32), "number": Plane(None, torch.int32)}
RUN = RUN_BYTES // (PAGE * 256 * 4)
"""Pages of a run that is long enough: 16."""


def runs(table: PageTable) -> np.ndarray:
    """Lengths of the runs of each row's pages, of those that hold tokens."""
    found = [0]
    for pages, count in zip(table.table.tolist(), table.needed.tolist(), strict=True):
        for before, page in zip([-9, *pages], pages[:count], strict=False):
            if page == before + 1:
                found[-1] += 1
            else:
                found.append(1)
    return np.array(found[1:])


def share(tables: list[PageTable]) -> float:
    """Of the pages that hold tokens, those in runs that are long enough."""
    lengths = np.concatenate([runs(table) for table in tables])
    return float(lengths[lengths >= RUN].sum() / max(1, lengths.sum()))


def write(table: PageTable, counts: list[int], first: int = 0) -> None:
    """Tokens numbered on from `first`, row by row."""
    numbers = torch.arange(first, first + sum(counts), dtype=torch.int32)
    table.add(np.array(counts), {"keys": numbers[:, None].expand(-1, 256), "number": numbers})


# -- which pages -----------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=40))
def test_stretches(flags):
    starts, lengths = stretches(np.array(flags, dtype=bool))
    marks = np.zeros(len(flags), dtype=bool)
    for start, length in zip(starts, lengths, strict=True):
        assert length and not marks[max(0, start - 1) : start + length + 1].any()
        marks[start : start + length] = True
    assert marks.tolist() == flags


@pytest.mark.parametrize(
    ("free", "count", "found"),
    [
        ("1111 1111 0000", 5, (0, 5)),
        ("0111 1111 1111", 5, (4, 5)),  # whole blocks alone: the rest of the first is its row's
        ("0001 1111 1111 1111", 5, (8, 5)),  # a block of room for who ends there
        ("1111 0001 1111 1111", 3, (0, 3)),  # the shortest that is long enough
        ("1111 0001 1111 1111", 9, (8, 8)),  # none is: the longest
        ("0111 1011 1101", 1, None),
        ("0000 111", 1, None),
    ],
)  # fmt: skip
def test_blocks_that_nobody_has_begun(free, count, found):
    wanted = np.array([flag == "1" for flag in free.replace(" ", "")])
    assert blocks(wanted, 4, count) == found


@given(st.data())
def test_places_are_free_ones_each_once(data):
    run = data.draw(st.integers(1, 5))
    free = np.array(data.draw(st.lists(st.booleans(), min_size=1, max_size=60)), dtype=bool)
    held = np.flatnonzero(~free)
    rows = data.draw(st.integers(1, 4))
    behind = np.array([data.draw(st.sampled_from([-1, *held.tolist()])) for _ in range(rows)])
    counts, left = [], int(free.sum())
    for _ in range(rows):
        counts.append(data.draw(st.integers(0, left)))
        left -= counts[-1]
    before = free.copy()
    pages = place(free, run, np.array(counts), behind)
    assert len(pages) == sum(counts) == len(set(pages.tolist())) and before[pages].all()
    assert np.array_equal(free, before & ~np.isin(np.arange(len(free)), pages))
    last, count = int(behind[0]), counts[0]
    if last >= 0 and count and last + 1 < len(free) and before[last + 1]:  # the first row goes on where it ends
        assert pages[0] == last + 1


def test_a_row_goes_on_behind_itself_and_leaves_others_their_blocks():
    free = np.ones(16, dtype=bool)
    taken = [place(free, 4, np.array([1]), np.array([last])) for last in (-1, -1, 0, 8, -1, 1)]
    assert [pages.tolist() for pages in taken] == [[0], [8], [1], [9], [4], [2]]
    assert place(free, 4, np.array([6]), np.array([-1])).tolist() == [12, 13, 14, 15, 5, 6]  # then the longest rest


@given(st.data())
def test_rows_are_laid_side_by_side_each_page_once(data):
    held = data.draw(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), min_size=1, max_size=5))
    rows, run = [np.array(row, dtype=np.int32) for row in held], data.draw(st.integers(1, 4))
    pages = len({page for row in held for page in row}) + data.draw(st.integers(0, 30))
    old, new = laid(rows, run, pages)
    assert sorted(old.tolist()) == sorted({page for row in held for page in row})
    assert len(set(new.tolist())) == len(new) and (new < pages).all() and (np.diff(new) > 0).all()
    where, known = dict(zip(old.tolist(), new.tolist(), strict=True)), set()
    for row in held:
        own = [where[page] for page in row if page not in known]
        assert own == list(range(own[0], own[0] + len(own))) if own else True
        known |= set(row)


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([[0, 1, 2], [7]], 0),  # each in one run, however short
        ([[0, 1, 2, 8], [3, 4, 5, 6, 20, 21]], 6),  # 0 to 2 and 8; 20 and 21 behind a run that is long enough
        ([[5, 4], [], [6]], 2),
        ([[], []], 0),
        ([], 0),
    ],
)
def test_pages_in_short_runs_are_counted_where_a_row_has_several(rows, count):
    assert broken([np.array(row, dtype=np.int32) for row in rows], 4) == count


# -- huge pages ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What the system is asked for, as (address, bytes, advice)."""
    calls: list[tuple[int, int, int]] = []
    ask = memory.advice()
    monkeypatch.setattr(memory, "advice", lambda: lambda *call: calls.append(call) or (ask(*call) if ask else 0))
    return calls


def test_large_planes_ask_for_huge_pages_within_themselves(asked):
    small = blank((1000,), torch.float32, CPU)
    assert not asked and small.shape == (1000,)
    large = blank((3, HUGE), torch.uint8, CPU)
    [(address, nbytes, kind)] = asked
    assert address % HUGE == nbytes % HUGE == 0 and nbytes >= HUGE and kind == 14
    assert large.data_ptr() <= address and address + nbytes <= large.data_ptr() + large.nbytes
    large.fill_(7)
    assert large.shape == (3, HUGE) and bool((large == 7).all())


def test_a_pool_asks_for_them_as_it_grows(asked):
    pool = PagePool(PLANES, CPU, PAGE)
    pool.allocate(1200)
    assert len(asked) == 1  # the numbers are a few kilobytes
    with torch.inference_mode():
        pool.ensure(1200)
    assert len(asked) == 2 and not pool.planes["keys"].is_inference()


@pytest.mark.parametrize(
    ("text", "found"),
    [("always [madvise] never", "madvise"), ("always madvise [never]", "never"), ("", None), (None, None)],
)  # fmt: skip
def test_what_the_system_grants(text, found, tmp_path, monkeypatch):
    place = tmp_path / "enabled"
    if text is not None:
        place.write_text(text)
    monkeypatch.setattr(memory, "SETTING", place)
    assert huge_pages() == found
    memory.advice.cache_clear()
    if found in (None, "never"):
        assert memory.advice() is None
        assert blank((2, HUGE), torch.uint8, CPU).shape == (2, HUGE)
    memory.advice.cache_clear()


# -- rows that come and go -------------------------------------------------------------------------------------


class Turnover:
    """Tables whose rows are written, cut, chosen, forked, joined and let go, beside what they must hold."""

    def __init__(self, seed: int, capacity: int | None, longest: int):
        self.draw, self.longest, self.capacity = random.Random(seed), longest, capacity
        self.arena = None if capacity is None else Arena(capacity * (PAGE * (256 * 4 + 4) + 4))
        self.live: list[tuple[PageTable, list[list[int]]]] = []
        self.next = self.refused = 0

    def pool(self) -> PagePool:
        return PagePool(PLANES, CPU, PAGE) if self.arena is None else self.arena.pool("a", PLANES, CPU, PAGE)

    def write(self, index: int, counts: list[int]) -> None:
        table, truth = self.live[index]
        try:
            write(table, counts, self.next)
        except OutOfPages:
            self.refused += 1
            return
        for row, count in zip(truth, counts, strict=True):
            row.extend(range(self.next, self.next + count))
            self.next += count

    def choose(self, index: int, rows: list[int]) -> None:
        """As `Stored.select` does."""
        table, truth = self.live[index]
        chosen = table.select(np.array(rows))
        table.restart()
        chosen.compact()
        self.live[index] = chosen, [list(truth[row]) for row in rows]

    def turn(self) -> None:
        draw = self.draw
        for index, (table, _) in enumerate(self.live):
            self.write(index, [draw.randint(3, 5)] * table.rows)
        if len(self.live) < 12:
            rows = draw.randint(1, 4)
            self.live.append((PageTable(self.pool(), rows), [[] for _ in range(rows)]))
            self.write(len(self.live) - 1, [draw.randint(self.longest // 6, self.longest) * PAGE for _ in range(rows)])
        index = draw.randrange(len(self.live))
        table, truth = self.live[index]
        kind = draw.choice(["crop", "keep", "drop", "choose", "reorder", "fork", "join", "retire", "retire"])
        if kind in ("crop", "keep"):
            left = [int(len(row) * (1 if kind == "crop" else draw.uniform(0.3, 1))) for row in truth]
            left = [max(0, count - draw.randint(0, 40)) for count in left]
            table.cut(np.array(left))
            table.trim(slack=kind == "crop")
            for row, count in zip(truth, left, strict=True):
                del row[count:]
        elif kind == "drop":
            gone = np.zeros(table.table.shape, dtype=bool)
            for row, marks in zip(truth, gone, strict=True):
                marks[: len(row) // PAGE // 2] = True
                del row[: len(row) // PAGE // 2 * PAGE]
            table.drop_pages(gone)
        elif kind == "choose" and table.rows > 1:
            self.choose(index, sorted(draw.sample(range(table.rows), table.rows - 1)))
        elif kind == "reorder":
            self.choose(index, [draw.randrange(table.rows) for _ in range(table.rows)])
        elif kind == "fork":
            self.live.append((table.fork(), [list(row) for row in truth]))
        elif kind == "join" and len(self.live) > 1:
            other, more = self.live.pop(index - 1)
            table.join(other)
            truth.extend(more)
        elif kind == "retire":
            self.live.pop(index)
        while self.live and sum(table.rows for table, _ in self.live) > 40:
            self.live.pop(draw.randrange(len(self.live)))

    def check(self) -> None:
        for table, truth in self.live:
            numbers = table.dense("number")
            assert [numbers[i, : len(row)].tolist() for i, row in enumerate(truth)] == truth


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 4600, 6000], ids=["own pools", "full arena", "arena"])
def test_rows_that_come_and_go_for_long_lie_in_runs(capacity):
    """At every tenth turn; what an arena copies for it is bounded. The full one refuses what finds no room."""
    some, shares = Turnover(1, capacity, 300), []
    for turn in range(120):
        some.turn()
        if turn % 10 == 9:
            some.check()
            shares.append(share([table for table, _ in some.live]))
    assert min(shares) >= 0.9, shares
    if some.arena is not None:
        pool = some.pool()
        assert 0 < pool.mended <= ALLOWED * pool.handed
        assert pool.moved_nbytes >= pool.mended * pool.page_nbytes
        assert (some.refused > 20) == (capacity == 4600)
