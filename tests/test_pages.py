"""Pages: allocation, reference counts, copy-on-write, growth, accounting."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, DenseSegment, Spec
from kvfold.pages import PagePool, PageTable, Plane

CPU = torch.device("cpu")


def pool(page_size: int = 4) -> PagePool:
    planes = {"keys": Plane(3, torch.float32), "age": Plane(None, torch.int16, fill=7.0)}
    return PagePool(planes, CPU, page_size)


def write(table: PageTable, counts: list[int], first: int = 0) -> None:
    """Append tokens numbered on from `first`, row by row, to both planes."""
    pages, offsets = table.slots(np.array(counts))
    numbers = torch.arange(first, first + len(pages))
    table.pool.planes["keys"][pages, offsets] = numbers[:, None].expand(-1, 3).float()
    table.pool.planes["age"][pages, offsets] = numbers.short()


def rows(table: PageTable) -> list[list[int]]:
    """What each row holds, both planes agreeing."""
    keys, ages, valid = table.dense("keys"), table.dense("age"), table.valid()
    assert keys.shape == (*valid.shape, 3) and ages.shape == valid.shape
    assert torch.equal(keys[valid], ages[valid][:, None].expand(-1, 3).float())
    return [ages[row][valid[row]].tolist() for row in range(table.rows)]


def test_allocate_and_release():
    some = pool()
    ids = some.allocate(5)
    assert sorted(ids) == list(range(5)) and (some.refs == 1).all()
    assert (some.pages, some.used, some.shared) == (5, 5, 0)
    some.retain(ids[:2])
    some.retain(ids[[0, 0]])  # a number may occur twice
    assert some.refs[ids].tolist() == [4, 2, 1, 1, 1] and some.shared == 2
    some.release(ids)
    assert (some.used, some.shared) == (2, 1)
    some.release(ids[[0, 0, 0, 1]])
    assert (some.pages, some.used, some.shared) == (5, 0, 0)
    assert len(set(some.allocate(5))) == 5 and some.pages == 5  # freed ones first, none twice


def test_growth_is_by_a_part_and_keeps_what_is_there():
    some = pool()
    some.allocate(64)
    some.planes["age"][:] = torch.arange(64)[:, None].short()
    some.allocate(1)
    assert (some.pages, some.used) == (66, 65)
    assert some.planes["age"][:64, 0].tolist() == list(range(64))
    assert (some.planes["age"][64:] == 7).all()


def test_bytes_are_those_of_all_tensors():
    some = pool()
    assert some.nbytes == 0
    some.allocate(3)
    assert some.nbytes == 3 * 4 * (3 * 4 + 2) + 3 * 4  # keys and age, then reference counts
    some.add_plane("mass", Plane(None, torch.float64, fill=2.0))
    some.add_plane("age", Plane(None, torch.float64))  # there already
    assert some.planes["mass"].tolist() == [[2.0] * 4] * 3 and some.planes["age"].dtype == torch.int16
    assert some.nbytes == sum(plane.untyped_storage().nbytes() for plane in some.planes.values()) + some.refs.nbytes


def test_even_rows_lie_side_by_side_and_ragged_ones_read_the_same():
    even, ragged = PageTable(pool(), 2), PageTable(pool(), 2)
    write(even, [6, 6])
    write(ragged, [6, 0])
    write(ragged, [0, 6], first=6)
    assert even.regular and not ragged.regular
    assert rows(even) == rows(ragged) == [list(range(6)), list(range(6, 12))]
    assert even.dense("keys").data_ptr() == even.pool.planes["keys"].data_ptr()  # a view, no copy
    for table in (even, ragged):
        write(table, [1, 3], first=50)
        assert rows(table) == [[*range(6), 50], [*range(6, 12), 51, 52, 53]]
        for start, stop in np.ndindex(9, 10):
            assert torch.equal(table.dense("age", start, stop), table.dense("age")[:, start:stop])


def test_tail_is_the_same_place_in_every_row_or_none():
    table = PageTable(pool(), 2)
    write(table, [5, 5])
    assert table.tail(3) == slice(5, 8) and table.lengths.tolist() == [8, 8]
    fork = table.fork()
    assert table.tail(1) is None and table.lengths.tolist() == [8, 8]
    fork.release()
    assert table.tail(1) == slice(8, 9)
    write(table, [1, 0])
    assert table.tail(1) is None


def test_growing_token_by_token_moves_rarely_and_wastes_little():
    table, pools = PageTable(pool(page_size=16), 6), set()
    for count in range(1, 2001):
        assert table.tail(1) == slice(count - 1, count)
        pools.add(id(table.pool.planes["keys"]))
        assert table.pool.pages * 16 <= 6 * (count * 9 / 8 + 32)
    assert table.regular and len(pools) < 60


def test_forks_share_until_one_writes():
    table = PageTable(pool(), 2)
    write(table, [6, 6])
    used = table.pool.used
    fork = table.fork()
    assert fork.pool is table.pool and table.pool.used == used and table.pool.shared == used
    write(fork, [1, 1], first=90)
    assert rows(table) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert rows(fork) == [[0, 1, 2, 3, 4, 5, 90], [6, 7, 8, 9, 10, 11, 91]]
    assert table.pool.shared == 2 and table.pool.used == used + 2  # the first page of each row is still shared
    write(table, [1, 1], first=80)
    assert rows(fork)[0][-1] == 90 and rows(table)[0][-1] == 80
    fork.release()
    assert (table.pool.shared, table.pool.used) == (0, used) and table.exclusive


def test_select_repeats_rows_and_drops_rows():
    table = PageTable(pool(), 3)
    write(table, [5, 5, 5])
    chosen = table.select(np.array([2, 2, 0, 2]))
    assert table.pool.refs[table.table].tolist() == [[2, 2], [1, 1], [4, 4]]
    table.release()
    assert table.pool.used == 4 and table.pool.shared == 2  # nobody holds row 1 any more
    write(chosen, [1, 1, 1, 1], first=70)
    assert rows(chosen) == [[*range(10, 15), 70], [*range(10, 15), 71], [*range(5), 72], [*range(10, 15), 73]]


@pytest.mark.parametrize("chosen", [[1, 0], [0, 0], [1, 1], [0, 1]])
def test_as_many_rows_in_another_order(chosen):
    table = PageTable(pool(), 2)
    write(table, [6, 6])
    assert table.regular and rows(table.select(np.array(chosen))) == [rows(table)[row] for row in chosen]


def test_of_those_who_write_a_page_at_once_one_keeps_it():
    table = PageTable(pool(), 1)
    write(table, [3])
    beams, page = table.select(np.array([0, 0, 0])), table.table[0, 0]
    table.release()
    write(beams, [1, 1, 1], first=70)
    assert (beams.table == page).sum() == 1 and beams.pool.pages == 3
    assert rows(beams) == [[0, 1, 2, 70], [0, 1, 2, 71], [0, 1, 2, 72]]


def test_a_fork_that_goes_out_of_scope_lets_go():
    table = PageTable(pool(), 2)
    write(table, [5, 5])
    fork = table.fork()
    assert table.pool.shared
    del fork
    gc.collect()
    assert table.pool.shared == 0 and table.exclusive


@pytest.mark.parametrize("counts", [(9, 9, 9), (1, 30, 7), (0, 0, 0), (0, 17, 0)])
def test_trim_gives_back_every_page_past_the_end(counts):
    table = PageTable(pool(), 3)
    write(table, [40, 40, 40])
    before = [row[:count] for row, count in zip(rows(table), counts, strict=True)]
    table.lengths = np.array(counts, dtype=np.int32)
    table.trim()
    assert table.pool.pages == table.pool.used == sum(-(-count // 4) for count in counts)
    assert rows(table) == before


@pytest.mark.parametrize("over", [7, 8])
def test_trim_with_slack_leaves_few_pages_where_they_are(over):
    """One in 16 of what is held and a page a row: lest a step that gives what it took moves all tokens."""
    table = PageTable(pool(), 2)
    write(table, [440, 440])
    table.cut(np.array([4 * (110 - over)] * 2))
    table.trim(slack=True)
    assert table.table.shape[1] == (110 if over == 7 else 110 - over)


def test_trim_of_shared_pages_leaves_them_to_the_others():
    table = PageTable(pool(), 1)
    write(table, [12])
    fork = table.fork()
    fork.lengths = np.array([3], dtype=np.int32)
    fork.trim()
    assert rows(fork) == [[0, 1, 2]] and rows(table) == [list(range(12))]
    assert table.pool.refs[table.table[0]].tolist() == [2, 1, 1]


def tokens(b: int, h: int, t: int, seed: int, valid: Tensor | None = None) -> Chunk:
    rng = torch.Generator().manual_seed(seed)
    k, v = torch.randn(b, h, t, 8, generator=rng), torch.randn(b, h, t, 8, generator=rng)
    columns = {
        POSITION: torch.arange(t, dtype=torch.int32).expand(b, h, t),
        LOG_MASS: torch.rand(b, h, t, generator=rng),
    }
    return Chunk(k, v, torch.ones(b, h, t, dtype=torch.bool) if valid is None else valid, columns)


@given(st.integers(1, 40), st.integers(0, 99))
def test_a_segment_attends_over_its_tokens_alone(t, seed):
    """Ragged rows, a read mask, masses: against torch.softmax row by row."""
    rng = torch.Generator().manual_seed(seed)
    chunk = tokens(2, 3, t, seed, torch.rand(2, 3, t, generator=rng) < 0.7)
    segment = Dense(page_size=4).open(Spec.of(chunk))
    segment.append(chunk)
    stored = segment.dense()
    read = torch.rand(stored.valid.shape, generator=rng) < 0.6
    q = torch.randn(2, 3, 2, 5, 8, generator=rng)
    for marks in (None, read):
        out, lse, _ = segment.attend(q, 0.3, read=marks)
        for row, head in np.ndindex(2, 3):
            keys, values = chunk.keys[row, head], chunk.values[row, head]
            here = chunk.valid[row, head].nonzero()[:, 0]
            if marks is not None:
                here = here[marks[row, head][stored.valid[row, head]]]
            if not len(here):
                assert (out[row, head] == 0).all() and (lse[row, head] == -torch.inf).all()
                continue
            logits = q[row, head] @ keys[here].T * 0.3 + chunk.columns[LOG_MASS][row, head, here]
            assert_close(out[row, head], logits.softmax(-1) @ values[here], atol=1e-5, rtol=1e-4)
            assert_close(lse[row, head], logits.logsumexp(-1), atol=1e-5, rtol=1e-4)


def test_a_narrower_dtype_is_rounded_once():
    chunk = tokens(1, 2, 9, 0)
    segment = Dense(torch.bfloat16, page_size=4).open(Spec.of(chunk))
    assert isinstance(segment, DenseSegment)
    segment.append(chunk)
    rounded = chunk.keys.bfloat16().float()
    assert torch.equal(segment.dense().keys, rounded) and segment.pool.planes["keys"].dtype == torch.bfloat16
    segment.keep(torch.arange(9).expand(1, 2, 9) % 2 == 0, {})
    assert torch.equal(segment.dense().keys, rounded[:, :, ::2])


@pytest.mark.parametrize("left", range(8))
def test_a_cut_counts_tokens_and_no_holes(left):
    """Holes in front of it, behind it and right at it."""
    chunk = tokens(1, 2, 9, seed=0)
    segment = Dense(page_size=16).segment(chunk)
    segment.append(chunk)
    segment.keep((torch.arange(9) % 5 != 1).expand(1, 2, 9), {}, slack=True)
    assert segment.table.holed
    segment.truncate(np.array([[left, 7]]))
    valid, columns = segment.columns()
    assert segment.counts().tolist() == [[left, 7]]
    assert columns[POSITION][0, 0][valid[0, 0]].tolist() == [0, 2, 3, 4, 5, 7, 8][:left]


@pytest.mark.parametrize("holed", [(True, False), (False, True), (True, True)])
def test_rows_that_are_joined_keep_their_holes(holed):
    parts, expected = [], []
    for some in holed:
        chunk = tokens(1, 2, 9, seed=0)
        parts.append(Dense(page_size=16).segment(chunk))
        parts[-1].append(chunk)
        parts[-1].keep((torch.arange(9) != (4 if some else 9)).expand(1, 2, 9), {}, slack=True)
        assert parts[-1].table.holed == some
        expected += [[place for place in range(9) if place != 4 or not some]] * 2
    parts[0].join(parts[1])
    valid, columns = (x.flatten(0, 1) for x in (parts[0].valid(), parts[0].column(POSITION)))
    assert [places[here].tolist() for places, here in zip(columns, valid, strict=True)] == expected


def test_kept_tokens_stay_in_order():
    chunk = tokens(2, 2, 23, 1)
    segment = Dense(page_size=4).open(Spec.of(chunk))
    segment.append(chunk)
    mask = torch.rand(2, 2, 23, generator=torch.Generator().manual_seed(2)) < 0.5
    segment.keep(mask, {})
    stored = segment.dense()
    for row, head in np.ndindex(2, 2):
        positions = stored.positions[row, head][stored.valid[row, head]].tolist()
        assert positions == mask[row, head].nonzero()[:, 0].tolist() == sorted(positions)
        assert torch.equal(stored.keys[row, head][stored.valid[row, head]], chunk.keys[row, head][mask[row, head]])


OPERATIONS = {
    "append": lambda segment, seed: segment.append(tokens(2, 2, 3, seed)),
    "append even": lambda segment, seed: segment.append(tokens(2, 2, 3, seed), even=True),
    "append a column": lambda segment, seed: segment.append(
        Chunk(*(getattr(tokens(2, 2, 1, seed), n) for n in ("keys", "values", "valid")),
              {POSITION: torch.zeros(2, 2, 1, dtype=torch.int32), "age": torch.ones(2, 2, 1)})
    ),
    "keep": lambda segment, seed: segment.keep(segment.dense().valid & (torch.arange(segment.longest) % 2 == 1), {}),
    "keep with a column": lambda segment, seed: segment.keep(
        segment.dense().valid & (torch.arange(segment.longest) > 0),
        {LOG_MASS: torch.full(segment.dense().valid.shape, float(seed))},
    ),
    "truncate": lambda segment, seed: segment.truncate(np.array([[2, 2], [1, 0]])),
    "clear": lambda segment, seed: segment.clear(),
}  # fmt: skip


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("length", [4, 10])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_one_fork_does_never_changes_the_other(operation, length, even):
    chunk = tokens(2, 2, length, 3)
    if not even:
        ragged = torch.arange(length) < torch.tensor([[length, 2], [3, 1]])[..., None]
        chunk = Chunk(chunk.keys, chunk.values, ragged, chunk.columns)
    for changed in (0, 1):  # the original, then the fork
        segment = Dense(page_size=4).open(Spec.of(chunk))
        segment.append(chunk, even=even)
        pair = [segment, segment.select(np.arange(2))]
        assert segment.table.regular == (even or length == 4)  # one page each lies side by side
        for seed, (one, other) in enumerate((pair, pair[::-1]) if changed == 0 else (pair[::-1], pair)):
            before, count = other.dense(), other.counts().copy()
            before = [x.clone() for x in (before.keys, before.values, before.columns[LOG_MASS])]
            OPERATIONS[operation](one, seed)
            after = other.dense()
            assert np.array_equal(other.counts(), count)
            for x, y in zip(before, (after.keys, after.values, after.columns[LOG_MASS]), strict=True):
                assert torch.equal(x[after.valid], y[after.valid])


def test_a_cleared_fork_leaves_its_parents_pool():
    chunk = tokens(2, 2, 20, 0)
    parent = Dense(page_size=4).open(Spec.of(chunk))
    parent.append(chunk, even=True)
    nbytes, fork = parent.nbytes, parent.select(np.arange(2))
    for _ in range(3):
        fork.clear()
        fork.append(tokens(2, 2, 30, 1), even=True)
    assert fork.pool is not parent.pool and parent.nbytes == nbytes and parent.table.exclusive
    assert torch.equal(parent.dense().keys, chunk.keys) and torch.equal(fork.dense().keys, tokens(2, 2, 30, 1).keys)


def beams(length: int, count: int = 4) -> DenseSegment:
    """Beams that read the same prompt and all descend from row 0."""
    one = tokens(1, 2, length, 0)
    columns = {name: column.expand(count, -1, -1) for name, column in one.columns.items()}
    wide = Chunk(*(x.expand(count, *x.shape[1:]) for x in (one.keys, one.values, one.valid)), columns)
    segment = Dense().open(Spec.of(wide))
    segment.append(wide, even=True)
    return reorder(segment, [0] * count)


def reorder(segment: DenseSegment, chosen: list[int]) -> DenseSegment:
    """As `KVLayer.select` does."""
    other = segment.select(np.array(chosen))
    segment.clear()
    other.compact()
    return other


def test_beams_of_one_row_hold_one_row():
    one, chunk = beams(300, 1), tokens(1, 2, 300, 0)
    segment = beams(300)
    assert segment.nbytes <= 1.02 * one.nbytes
    held = segment.table.table
    assert (segment.pool.refs == 4).all() and segment.pool.shared == segment.pool.used == segment.pool.pages == 38
    assert (held.reshape(4, -1) == held.reshape(4, -1)[0]).all() and not segment.table.regular
    segment.append(Chunk(*(getattr(tokens(4, 2, 1, 7), n) for n in ("keys", "values", "valid")), {}), even=True)
    for beam in range(4):
        assert torch.equal(segment.dense().keys[beam, :, :300], chunk.keys[0])
        assert torch.equal(segment.dense().keys[beam, :, 300:], tokens(4, 2, 1, 7).keys[beam])
    assert np.bincount(segment.pool.refs).tolist()[1:] == [8, 0, 0, 36]  # each beam its own last page


def test_a_fork_that_holds_the_same_pages_is_in_the_way_of_moving():
    segment = beams(300)
    segment.truncate(np.full((4, 2), 20))
    fork, pool = segment.select(np.arange(4)), segment.pool
    segment.compact()
    assert segment.pool is pool
    fork.clear()
    segment.compact()
    assert segment.pool is not pool and segment.pool.pages == 4 and pool.used == 0


def test_rows_that_share_nothing_lie_side_by_side_after_moving():
    chunk = tokens(4, 2, 20, 0)
    segment = Dense(page_size=4).open(Spec.of(chunk))
    segment.append(chunk, even=True)
    chosen = reorder(segment, [3, 1])
    assert chosen.table.regular and chosen.pool.pages == 2 * 2 * 5
    assert torch.equal(chosen.dense().keys, chunk.keys[[3, 1]])


def test_reordering_at_every_step_moves_rarely():
    segment, pools, storages = beams(300), set(), set()
    for step in range(20):
        segment.append(tokens(4, 2, 1, step), even=True)
        segment = reorder(segment, [[0, 0, 1, 3], [1, 0, 0, 0], [0, 1, 2, 3], [2, 2, 2, 2]][step % 4])
        pools.add(segment.pool)
        storages.add(segment.pool.planes["keys"].untyped_storage().data_ptr())
    assert len(pools) <= 2 and len(storages) <= 6
    assert segment.nbytes < 1.6 * beams(300, 1).nbytes
