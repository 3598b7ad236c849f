"""Arenas: pools that share a limit, and tables that take pages from them and give them back."""

import numpy as np
import pytest
import torch

from kvfold.formats import POSITION, Chunk, Dense, DenseSegment, Spec
from kvfold.pages import Arena, OutOfPages, PageTable, Plane

CPU, PAGE = torch.device("cpu"), 4
PLANES = {"keys": Plane(3, torch.float32), "age": Plane(None, torch.int16, fill=7.0)}
BYTES = PAGE * (3 * 4 + 2) + 4
"""Of a page, its reference count included."""


def table(arena: Arena, rows: int = 1, key: object = "a") -> PageTable:
    return PageTable(arena.pool(key, PLANES, CPU, PAGE), rows)


def write(some: PageTable, counts: list[int], first: int = 0) -> None:
    numbers = torch.arange(first, first + sum(counts))
    some.add(np.array(counts), {"keys": numbers[:, None].expand(-1, 3), "age": numbers})


def rows(some: PageTable) -> list[list[int]]:
    return [age[:length].tolist() for age, length in zip(some.dense("age"), some.lengths, strict=True)]


def test_one_pool_for_a_key_and_bytes_of_all():
    arena = Arena(100 * BYTES)
    one, two, other = table(arena), table(arena), table(arena, key="b")
    assert one.pool is two.pool and other.pool is not one.pool and arena.pools == [one.pool, other.pool]
    for some in (one, two, other):
        write(some, [9])
    assert arena.used_nbytes == 9 * BYTES <= arena.nbytes <= arena.capacity == 100 * BYTES
    own = sum(x.nbytes for x in (one.table, one.lengths, one.holes, one.hole_count))
    assert one.nbytes == 3 * BYTES + own
    fork = one.fork()
    assert fork.nbytes == one.nbytes and arena.used_nbytes == 9 * BYTES  # each holder counts what it shares
    assert one.bytes_beside(counted := set()) == one.nbytes and fork.bytes_beside(counted) == own
    assert not (one.regular or one.exclusive) and one.shared and not two.shared


def test_memory_of_released_pages_is_used_again():
    arena = Arena(10 * BYTES)
    one, two = table(arena), table(arena)
    write(one, [40])
    assert arena.nbytes == arena.used_nbytes == 10 * BYTES
    for turn in range(5):
        held = one.pool.planes["keys"].data_ptr()
        one.restart()
        assert arena.used_nbytes == 0
        write(two, [40], turn)
        assert rows(two) == [list(range(turn, turn + 40))] and two.pool.planes["keys"].data_ptr() == held
        one, two = two, one


def test_out_of_pages_says_what_is_missing_and_changes_nothing():
    arena = Arena(10 * BYTES)
    one, two = table(arena, 2), table(arena)
    write(one, [10, 6])
    write(two, [9], 50)
    before, state = (arena.nbytes, arena.used_nbytes), (one.table, one.lengths)
    with pytest.raises(OutOfPages, match=rf"4 more need {4 * BYTES} bytes; {2 * BYTES} of the arena's {10 * BYTES}"):
        write(one, [8, 10])
    assert (arena.nbytes, arena.used_nbytes) == before and (one.table, one.lengths) == state
    fork = one.fork()  # the last pages are shared: two copies, and one more page
    assert fork.pages_for(np.array([1, 3])) == 3
    with pytest.raises(OutOfPages):
        write(fork, [1, 3])
    assert rows(fork) == rows(one) == [list(range(10)), list(range(10, 16))] and arena.used_nbytes == before[1]
    assert fork.pages_for(np.array([1, 2])) == 2
    write(fork, [1, 2], 80)
    assert rows(fork) == [[*range(10), 80], [*range(10, 16), 81, 82]] and rows(two) == [list(range(50, 59))]


def test_many_tables_ask_before_any_is_written():
    arena = Arena(10 * BYTES)
    tables = [table(arena), table(arena, key="b"), table(arena)]
    for some in tables:
        write(some, [12])  # full pages: 9 of 10
    one = np.array([1])
    wanted = {some.pool: 0 for some in tables}
    for some in tables:
        wanted[some.pool] += some.pages_for(one)
    assert sorted(wanted.values()) == [1, 2]
    sizes = [pool.pages for pool in arena.pools]
    with pytest.raises(OutOfPages):
        arena.check(wanted)
    assert [pool.pages for pool in arena.pools] == sizes
    tables[2].restart()
    arena.check({some.pool: some.pages_for(one) for some in tables[:2]})
    for some in tables[:2]:  # neither can take what the other was promised
        write(some, [1], 90)
    assert [rows(some)[0][-1] for some in tables[:2]] == [90, 90]


def test_pools_grow_in_steps():
    arena = Arena(1000 * BYTES)
    some, storages = table(arena), set()
    for number in range(1600):
        write(some, [1], number)
        storages.add(some.pool.planes["keys"].data_ptr())
        assert some.pool.pages <= 9 / 8 * some.pool.used + 1
    assert len(storages) < 60 and rows(some) == [list(range(1600))]


def test_pools_that_grow_together_share_what_is_left():
    arena = Arena(171 * BYTES)
    one, two = table(arena), table(arena, key="b")
    for some in (one, two):
        write(some, [320])
    arena.check({one.pool: 1, two.pool: 1})
    assert (one.pool.free, two.pool.free) == (10, 1) and arena.nbytes <= arena.capacity


def test_what_is_free_at_the_end_of_one_pool_goes_to_another():
    arena = Arena(10 * BYTES)
    one, two, three = table(arena), table(arena), table(arena, key="b")
    write(one, [8])
    write(two, [24])
    two.restart()
    assert one.pool.pages == 8
    write(three, [30], 5)
    assert one.pool.pages == 2 and rows(one) == [list(range(8))] and rows(three) == [list(range(5, 35))]
    assert arena.nbytes == 10 * BYTES


def test_a_column_needs_room_too():
    arena = Arena(10 * BYTES)
    some = table(arena)
    write(some, [36])
    with pytest.raises(OutOfPages):
        some.pool.add_plane("score", Plane(2, torch.float64))
    assert "score" not in some.pool.planes
    some.pool.add_plane("mark", Plane(None, torch.uint8))
    assert arena.nbytes == 9 * (BYTES + PAGE)


def test_a_pool_is_of_one_kind():
    arena = Arena(10 * BYTES)
    arena.pool("a", PLANES, CPU, PAGE)
    with pytest.raises(ValueError, match="pages of 4 tokens on cpu, not 8"):
        arena.pool("a", PLANES, CPU, 8)
    with pytest.raises(ValueError, match=r"planes: 'age' is .*int32.* key='a' has it as .*int16"):
        arena.pool("a", {"age": Plane(None, torch.int32)}, CPU, PAGE)
    assert "mark" in arena.pool("a", {"mark": Plane(None, torch.uint8)}, CPU, PAGE).planes


@pytest.mark.parametrize("nbytes", [0, -1, 1.5, True, "1GiB"])
def test_an_arena_has_a_size(nbytes, unchecked):
    with pytest.raises(ValueError, match=r"nbytes=.* must be an int >= 1"):
        Arena(nbytes)


# -- segments in an arena --------------------------------------------------------------------------------------


def tokens(t: int, seed: int = 0, b: int = 2) -> Chunk:
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(2, b, 2, t, 8, generator=rng)
    positions = torch.arange(t, dtype=torch.int32).expand(b, 2, t).contiguous()
    return Chunk(*states, torch.ones(b, 2, t, dtype=torch.bool), {POSITION: positions})


def opened(arena: Arena | None, t: int, seed: int = 0) -> DenseSegment:
    chunk = tokens(t, seed)
    segment = Dense(page_size=PAGE).open(Spec.of(chunk, arena=arena))
    segment.append(chunk, even=True)
    return segment


def test_caches_share_an_arena_and_answer_as_alone():
    arena, q = Arena(1 << 16), torch.randn(2, 2, 3, 1, 8)
    pairs = [(opened(arena, t, t), opened(None, t, t)) for t in (9, 30, 1)]
    fork = pairs[0][0].select(np.arange(2))  # from here on pages of the pool are shared
    for step in range(9):
        new = tokens(1, 100 + step)
        at = torch.full((2, 1), 50 + step, dtype=torch.int32)
        for mine, alone in pairs:
            got, want = (x.step(q, new.keys, new.values, at, 0.3, weights=False) for x in (mine, alone))
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for mine, alone in pairs:
        for x in (mine, alone):
            x.keep(x.columns()[0] & (torch.arange(x.longest) % 3 > 0), {"score": torch.ones(2, 2, x.longest)})
        assert torch.equal(mine.attend(q, 0.3)[0], alone.attend(q, 0.3)[0])
    assert torch.equal(fork.dense().keys, tokens(9, 9).keys)
    assert len({id(mine.pool) for mine, _ in pairs}) == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_full_arena_lets_tokens_go_in_place(shared):
    arena = Arena(1 << 16)
    segment = opened(arena, 16)
    arena.capacity = arena.nbytes
    fork = segment.select(np.arange(2)) if shared else None
    mask = segment.columns()[0] & (torch.arange(16) % 2 == 0)
    if fork is not None:  # what stays would need pages of its own
        with pytest.raises(OutOfPages):
            segment.keep(mask, {})
        assert torch.equal(segment.dense().keys, tokens(16).keys) and segment.same_pages(fork)
        fork.clear()
    segment.keep(mask, {})
    assert torch.equal(segment.dense().keys, tokens(16).keys[:, :, ::2]) and segment.pool.free == 8


def test_joining_into_an_arena_and_out_of_it():
    arena = Arena(1 << 16)
    inside, near, outside = opened(arena, 9), opened(arena, 12, 1), opened(None, 5, 2)
    used, capacity = inside.pool.used, arena.capacity
    inside.join(near)
    assert inside.pool.used == used and not near.longest  # references have moved
    arena.capacity = arena.nbytes
    with pytest.raises(OutOfPages):
        inside.join(outside)
    assert inside.batch == 4 and outside.longest == 5
    arena.capacity = capacity
    inside.join(outside)
    stored = inside.dense()
    for i, (t, seed) in enumerate(((9, 0), (12, 1), (5, 2))):
        assert torch.equal(stored.keys[2 * i : 2 * i + 2, :, :t], tokens(t, seed).keys)
    taken = opened(None, 1, 3)
    taken.join(inside)
    assert arena.used_nbytes == 0 and taken.counts().tolist() == [[n] * 2 for n in (1, 1, 9, 9, 12, 12, 5, 5)]
    assert torch.equal(taken.dense().keys[4:6, :, :12], tokens(12, 1).keys)
