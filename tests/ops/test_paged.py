"""Operations on pages: replaceable, and the definition moves no more than it must."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, DenseSegment, Spec
from kvfold.ops import dispatch
from kvfold.ops.paged import naive
from kvfold.pages import PageTable


def tokens(b: int, t: int, seed: int = 0, lengths: list[int] | None = None) -> Chunk:
    rng = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, b, 2, t, 8, generator=rng)
    columns = {
        POSITION: torch.arange(t, dtype=torch.int32).expand(b, 2, t),
        LOG_MASS: torch.rand(b, 2, t, generator=rng),
    }
    wide = torch.tensor(lengths or [t] * b)[:, None, None]
    return Chunk(keys, values, (torch.arange(t) < wide).expand(b, 2, t), columns)


def segment(b: int, t: int, lengths: list[int] | None = None, page: int = 4) -> DenseSegment:
    chunk = tokens(b, t, lengths=lengths)
    made = Dense(page_size=page).open(Spec.of(chunk))
    made.append(chunk, even=lengths is None)
    return made


@pytest.mark.parametrize("op", ["attend_pages", "append_pages", "keep_pages"])
def test_a_registered_version_is_picked_and_sees_the_page_table(op, monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {name: list(known) for name, known in dispatch._kernels.items()})
    assert dispatch.versions(op)[-2:] == ["cpu", "naive"]
    seen = []

    def fast(*args, **options):
        seen.extend(arg for arg in args if isinstance(arg, PageTable))
        return getattr(naive, op)(*args, **options)

    dispatch.register(op, "fast", rank=30, fits=lambda x: x.dtype == torch.float32)(fast)
    got, q = segment(2, 9, [9, 4]), torch.randn(2, 2, 3, 1, 8)
    got.keep(got.dense().valid & (torch.arange(9) != 2), {})
    out, lse, _ = got.attend(q, 0.3)
    assert seen == [got.table]
    with dispatch.use("naive"):
        want = segment(2, 9, [9, 4])
        want.keep(want.dense().valid & (torch.arange(9) != 2), {})
        assert_close((out, lse), want.attend(q, 0.3)[:2])
    assert seen == [got.table]


def test_the_functions_take_a_table_and_planes():
    table = segment(1, 5).table
    planes = {"keys": torch.ones(2, 1, 8), "values": torch.ones(2, 1, 8)}
    ops.append_pages(table, planes, None)
    assert table.lengths.tolist() == [6, 6] and table.dense(LOG_MASS)[:, 5].tolist() == [0.0, 0.0]
    ops.keep_pages(table, torch.arange(6).expand(2, 6) > 4, {POSITION: torch.full((2, 6), 7)})
    assert table.dense("keys").tolist() == torch.ones(2, 1, 8).tolist() and table.dense(POSITION).tolist() == [[7], [7]]
    out, lse, _ = ops.attend_pages(torch.zeros(1, 2, 1, 1, 8), table, 1.0, mass=LOG_MASS)
    assert (out == 1).all() and (lse == 0).all()


def storages(some: DenseSegment) -> list[int]:
    return [plane.untyped_storage().data_ptr() for plane in some.pool.planes.values()]


@pytest.mark.parametrize("lengths", [None, [70, 31]], ids=["even", "ragged"])
def test_one_in_one_out_writes_in_place(lengths):
    """As at every decode step of a method with a budget: nothing moves to another pool."""
    some = segment(2, 70, lengths)
    for step in range(3):
        some.append(tokens(2, 1, step), even=True)
        some.keep(some.dense().valid & (torch.arange(some.longest) != 5), {})
    before = storages(some)
    for step in range(20):
        held = some.dense()
        expected = [x[some.dense().valid].clone() for x in (held.keys, held.positions)]
        some.append(tokens(2, 1, step), even=True)
        mask = torch.arange(some.longest) < torch.from_numpy(some.counts() - 1)[..., None]
        some.keep(mask, {})
        now = some.dense()
        for x, y in zip(expected, (now.keys, now.positions), strict=True):
            assert torch.equal(x, y[now.valid])
    assert storages(some) == before


def drop(some: DenseSegment, count: int) -> None:
    some.keep(torch.arange(some.longest) < torch.from_numpy(some.counts() - count)[..., None], {})


def test_many_small_drops_give_pages_back():
    some = segment(2, 200, [200, 150])
    nbytes = some.nbytes
    for _ in range(30):
        drop(some, 4)
    assert some.nbytes < 0.5 * nbytes


@pytest.mark.parametrize("lengths", [None, [40, 31]], ids=["even", "ragged"])
@pytest.mark.parametrize("fork", [False, True])
def test_keeping_everything_writes_only_columns(lengths, fork):
    some = segment(2, 40, lengths)
    other = some.select(np.arange(2)) if fork else None
    held, before, valid = some.dense().keys.clone(), storages(some), some.dense().valid
    mass, old = torch.rand(valid.shape), some.dense().columns[LOG_MASS].clone()
    some.keep(valid, {LOG_MASS: old, POSITION: some.dense().positions})
    assert storages(some) == before
    some.keep(valid, {LOG_MASS: mass})
    assert (storages(some) == before) != fork
    assert torch.equal(some.dense().columns[LOG_MASS][valid], mass[valid])
    assert torch.equal(some.dense().keys[valid], held[valid])
    if other is not None:
        assert torch.equal(other.dense().columns[LOG_MASS][valid], old[valid])


@pytest.mark.parametrize("shared", [False, True])
def test_even_rows_go_to_ragged_pages_without_a_mask(shared):
    some = segment(2, 20, None if shared else [20, 7])
    other = some.select(np.arange(2)) if shared else None
    more = tokens(2, 6, 3)

    class Unread(Tensor):
        """A mask that nobody may look at."""

    chunk = Chunk(more.keys, more.values, more.valid.as_subclass(Unread), more.columns)
    Unread.__torch_function__ = None  # any use of it is an error
    some.append(chunk, even=True)
    stored, counts = some.dense(), some.counts()
    for row, head in np.ndindex(2, 2):
        count = counts[row, head]
        assert torch.equal(stored.keys[row, head, count - 6 : count], more.keys[row, head])
        assert torch.equal(stored.positions[row, head, count - 6 : count], more.positions[row, head])
    assert other is None or other.counts().tolist() == [[20, 20]] * 2


@pytest.mark.parametrize("length", [40, 300, 1000])
def test_drafts_that_are_taken_back_do_not_move_the_rest(length):
    some, places = segment(1, length, page=16), []
    for step in range(12):
        some.append(tokens(1, 20, step), even=True)
        places.append(storages(some)[0])
        some.truncate(some.counts() - 19, slack=True)
        assert some.pool.pages * 16 <= 2 * (some.longest * 5 / 4 + 64)
    assert len(set(places)) <= 3
    some.truncate(some.counts())
    assert some.pool.pages == 2 * -(-some.longest // 16)


def test_a_long_crop_gives_memory_back():
    some = segment(1, 300, page=16)
    some.truncate(some.counts() - 200, slack=True)
    assert some.pool.pages == 2 * 7
