"""Pages that move: to another table, out of a row, and with what a page has once."""

import numpy as np
import pytest
import torch

from kvfold.pages import PagePool, PageTable, Plane

CPU, PAGE = torch.device("cpu"), 4
PLANES = {"age": Plane(None, torch.int32, fill=7.0), "stamp": Plane(2, torch.float16, per_page=True)}


def table(counts: list[int], first: int = 0, planes: dict[str, Plane] = PLANES, **options) -> PageTable:
    made = PageTable(PagePool(planes, CPU, PAGE), len(counts), **options)
    write(made, counts, first)
    return made


def write(some: PageTable, counts: list[int], first: int) -> None:
    """Tokens numbered on from `first`; each page is stamped by the first of its own."""
    numbers = torch.arange(first, first + sum(counts))
    start = np.concatenate([np.arange(count) + length for count, length in zip(counts, some.lengths, strict=True)])
    stamps = numbers[torch.from_numpy(start % PAGE == 0)]
    some.add(np.array(counts), {"age": numbers, "stamp": stamps[:, None].expand(-1, 2)})


def rows(some: PageTable) -> list[list[int]]:
    ages, stamps = some.dense("age"), some.paged("stamp")
    for row, length in enumerate(some.lengths):
        assert torch.equal(stamps[row, : -(-length // PAGE), 0].int(), ages[row, :length:PAGE])
    return [ages[row, :length].tolist() for row, length in enumerate(some.lengths)]


def test_a_page_has_one_of_what_it_has_once():
    some = table([9, 9])
    assert some.pool.planes["stamp"].shape == (6, 2) and some.pool.page_nbytes == PAGE * 4 + 2 * 2 + 4
    assert some.pool.nbytes == 6 * some.pool.page_nbytes
    assert rows(some) == [list(range(9)), list(range(9, 18))] and some.regular
    write(some, [3, 0], 50)  # nothing is begun
    write(some, [2, 8], 60)
    assert rows(some) == [[*range(9), 50, 51, 52, 60, 61], [*range(9, 18), *range(62, 70)]]


def test_a_copied_page_takes_it_along():
    some = table([6])
    fork = some.fork()
    write(fork, [3], 50)
    some.pool.planes["stamp"][some.table[0, 1]] = 99.0
    assert rows(fork) == [[0, 1, 2, 3, 4, 5, 50, 51, 52]] and some.paged("stamp")[0, 1].tolist() == [99.0, 99.0]


@pytest.mark.parametrize("scattered", [False, True])
def test_a_scattered_table_keeps_its_page_numbers(scattered):
    some = table([8, 8], scattered=scattered)
    assert some.regular != scattered
    before = some.table.copy()
    for step in range(10):
        write(some, [4, 4], 100 * step)
        assert not scattered or np.array_equal(some.table[:, :2], before)
    assert some.fork().scattered == scattered
    some.cut(np.array([4, 4]))
    some.trim()
    assert some.pool.pages == 2 and some.regular != scattered and rows(some) == [[0, 1, 2, 3], [8, 9, 10, 11]]


@pytest.mark.parametrize("shared", [False, True])
def test_dropped_pages_are_free_and_the_rest_stays_where_it_is(shared):
    some = table([14, 9, 0], scattered=True)
    fork = some.fork() if shared else None
    before = some.table.copy()
    gone = np.zeros((3, 4), dtype=bool)
    gone[0, [0, 2]] = gone[1, 2] = True  # the last page of a row may be dropped too
    some.drop_pages(gone)
    assert rows(some) == [[*range(4, 8), 12, 13], list(range(14, 22)), []]
    assert some.table.tolist() == [[*before[0, [1, 3]]], [*before[1, :2]], [-1, -1]]
    assert some.pool.free == (0 if shared else 3)
    if fork is None:
        some.trim()
        assert some.pool.pages == 4 and rows(some)[0] == [*range(4, 8), 12, 13]
    else:
        assert rows(fork) == [list(range(14)), list(range(14, 23)), []]


@pytest.mark.parametrize("counts", [([9, 9], [9, 9]), ([9, 1], [0, 22]), ([0], [0]), ([5], [0, 0])], ids=str)
def test_rows_of_another_pool_are_copied_and_lie_side_by_side_where_they_can(counts):
    mine, theirs = (table(some, first) for some, first in zip(counts, (0, 100), strict=True))
    wanted = rows(mine) + rows(theirs)
    mine.join(theirs)
    assert rows(mine) == wanted and theirs.lengths.tolist() == [0] * len(counts[1]) and theirs.pool.used == 0
    assert mine.regular == (len(set(mine.needed.tolist())) == 1)
    assert mine.pool.pages == mine.pool.used == mine.needed.sum()
    write(mine, [1] * mine.rows, 200)
    assert [row[-1] for row in rows(mine)] == list(range(200, 200 + mine.rows))


def test_rows_of_one_pool_move_without_a_copy():
    some = table([9, 5])
    pool, one, two = some.pool, some.select(np.array([0, 0])), some.select(np.array([1]))
    some.release()
    planes, held = dict(pool.planes), [*one.held, *two.held]
    one.join(two)
    assert one.pool is pool and pool.planes == planes and one.held.tolist() == held and pool.used == 5
    assert rows(one) == [list(range(9)), list(range(9)), list(range(9, 14))] and not two.longest
    assert pool.refs[one.table[0]].tolist() == [2, 2, 2]


def test_rows_that_share_pages_go_on_sharing_them():
    mine, theirs = table([3]), table([9])
    beams = theirs.select(np.array([0, 0, 0]))
    mine.join(beams)
    assert mine.pool.used == 4 and mine.pool.refs[mine.table[1, :3]].tolist() == [3, 3, 3]
    assert rows(theirs) == rows(mine)[1:2] == [list(range(9))]


def test_a_column_that_one_lacks_is_its_fill():
    mine, theirs = table([5]), table([6], 100, {**PLANES, "score": Plane(None, torch.float32, fill=2.0)})
    theirs.pool.planes["score"].fill_(4.0)
    released = table([4])
    mine.join(released)  # a page that comes back below holds something else
    mine.cut(np.array([5, 0]))
    mine.join(theirs)
    assert mine.dense("score")[0, :5].tolist() == [2.0] * 5 and mine.dense("score")[2].tolist() == [4.0] * 6
    more = table([2], 200)
    mine.join(more)
    assert mine.dense("score")[3, :2].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("name", ["age", "stamp"])
def test_columns_of_two_kinds_are_refused_before_anything_moves(name):
    mine, theirs = (
        table([5]),
        table([6], planes={**PLANES, name: Plane(PLANES[name].width, torch.float64, per_page=name == "stamp")}),
    )
    state = mine.table, mine.lengths
    with pytest.raises(ValueError, match=f"other has column '{name}' as .*float64"):
        mine.join(theirs)
    assert (mine.table, mine.lengths) == state and theirs.longest == 6
    with pytest.raises(ValueError, match="other has pages of 8 tokens; ours have 4"):
        mine.join(PageTable(PagePool(PLANES, CPU, 8), 1))


def test_nobody_changes_what_a_table_says_in_place():
    some = table([9, 5])
    holes, count = some.copy_holes()
    holes[0, 0], count[0] = 3, 1
    some.holes, some.hole_count = holes, count
    for array in (some.table, some.lengths, some.holes, some.hole_count, holes, some.fork().lengths):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    sent = some.on_device()
    assert [x.tolist() for x in sent[1:]] == [[9, 5], holes.tolist(), [1, 0]] and some.counts.tolist() == [8, 5]
