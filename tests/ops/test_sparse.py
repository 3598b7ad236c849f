"""Attention over kept numbers and bitmaps: the kernel against its definition in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from coded_pages import RAGGED, agree_in_float64, agree_one_by_one, refused, scattered, softmax_over, with_extra
from kvfold import ops
from kvfold.ops import _cpu, dispatch
from kvfold.ops.sparse import cpu, naive
from kvfold.ops.sparse.packing import map_bytes, pack, unpack
from kvfold.pages import PageTable, Plane

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
G = 3
SIZES = [(64, 64, 21, 33), (16, 8, 2, 8), (80, 96, 80, 1), (12, 20, 5, 7), (192, 256, 100, 17)]
"""Key size, value size, and how many of each are kept."""


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The CPU version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_sparse", refused)


def table_of(lengths: list[int], sizes: tuple[int, int, int, int], kind: torch.dtype, page: int) -> PageTable:
    """Random numbers on scattered pages; behind a row's tokens are NaN, and maps that mark everything."""
    d, dv, some, few = sizes
    planes = {
        "keys": Plane(some, kind), "key_map": Plane(map_bytes(d), torch.uint8),
        "values": Plane(few, kind), "value_map": Plane(map_bytes(dv), torch.uint8),
    }  # fmt: skip
    keys, key_map = pack(torch.randn(sum(lengths), d).to(kind), some)
    values, value_map = pack(torch.randn(sum(lengths), dv).to(kind), few)
    states = {"keys": keys, "key_map": key_map, "values": values, "value_map": value_map}
    return scattered(planes, lengths, page, states)


def softmax(
    q: Tensor, table: PageTable, scale: float, dv: int, mass: bool, read: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_over` whole vectors."""

    def numbers(row: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
        planes = table.read(("keys", "key_map", "values", "value_map"), np.full(len(at), row), at)
        keys = unpack(planes["keys"], planes["key_map"], q.shape[-1])
        return keys, unpack(planes["values"], planes["value_map"], dv)

    return softmax_over(q, table, scale, numbers, mass, read)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("extra", ["", "mass", "read", "holes"])
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_the_kernel_against_the_definition(sizes, kind, extra):
    torch.manual_seed(0)
    page, (d, dv, *_) = {"": 16, "mass": 4, "read": 64, "holes": 8}[extra], sizes
    table = table_of(RAGGED, sizes, kind, page)
    q = torch.randn(len(RAGGED), 1, G, 1, d)
    read = with_extra(table, extra)
    mass = "log_mass" if extra == "mass" else None
    got = ops.attend_sparse(q, table, d**-0.5, value_size=dv, mass=mass, read=read, weights=True)
    want = softmax(q, table, d**-0.5, dv, mass is not None, read)
    agree_in_float64(got, want, 3e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_heads_and_queries_of_a_row_are_answered_together(group, queries):
    torch.manual_seed(0)
    table = table_of([70, 5], (64, 64, 21, 21), torch.bfloat16, 16)
    q = torch.randn(1, 2, group, queries, 64)
    got = ops.attend_sparse(q, table, 0.1, value_size=64)
    agree_one_by_one(got, q, lambda one: softmax(one, table, 0.1, 64, False, None))


def test_the_definition_in_torch_agrees():
    torch.manual_seed(0)
    table = table_of([64, 32], (64, 32, 21, 9), torch.float16, 16)
    q = torch.randn(1, 2, G, 2, 64)
    fast = ops.attend_sparse(q, table, 0.1, value_size=32, mass="log_mass", weights=True)
    with dispatch.use("naive"):
        slow = ops.attend_sparse(q, table, 0.1, value_size=32, mass="log_mass", weights=True)
    for mine, theirs in zip(fast, slow, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("instructions")
def test_a_number_that_is_not_finite_is_seen_in_its_channel_alone():
    """A channel that is not kept is 0, whatever lies beside it in memory."""
    table = table_of([1], (16, 16, 2, 2), torch.float32, 4)
    value = torch.zeros(1, 16)
    value[0, 3], value[0, 9] = torch.nan, 2.0
    kept, maps = pack(value, 2)
    table.write(np.array([0]), np.array([0]), {"values": kept, "value_map": maps})
    out = ops.attend_sparse(torch.zeros(1, 1, 1, 1, 16), table, 0.1, value_size=16)[0].flatten()
    assert out[3].isnan() and out[9] == 2 and out[[i for i in range(16) if i not in (3, 9)]].eq(0).all()


@pytest.mark.parametrize(
    ("queries", "sizes", "page", "kind"),
    [
        (65, (16, 16, 5, 5), 16, torch.float32), (3, (18, 16, 5, 5), 16, torch.float32),
        (3, (16, 18, 5, 5), 16, torch.float32), (3, (16, 16, 5, 5), 10, torch.float32),
        (3, (16, 16, 5, 5), 16, torch.float64),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_handed_on(queries, sizes, page, kind, monkeypatch):
    asked = []
    run = naive.attend_sparse
    monkeypatch.setattr(naive, "attend_sparse", lambda *args, **more: asked.append(1) or run(*args, **more))
    table = table_of([2 * page], sizes, kind, page)
    q = torch.randn(1, 1, queries, 1, sizes[0])
    out = cpu.attend_sparse(
        q, table, 0.1, value_size=sizes[1], mass=None, read=None, compact=None, position="position", weights=False
    )[0]
    assert asked and out.isfinite().all() and out.shape == (1, 1, queries, 1, sizes[1])


def test_arrays_that_do_not_belong_together_are_refused():
    table = table_of([32, 64], (16, 16, 4, 6), torch.float16, 16)
    planes = {name: table.pool.array(name) for name in ("keys", "key_map", "values", "value_map")}
    q, out, lse = np.zeros((2, 3, 16), np.float32), np.zeros((2, 3, 16), np.float32), np.zeros((2, 3), np.float32)

    def call(page: int = 16, **other):
        _cpu.attend_sparse(
            q, *(planes | other).values(), None, None, table.table, table.lengths, table.holes, table.hole_count, page,
            1.0, 1, out, lse, None,
        )  # fmt: skip

    call()
    many = np.zeros((len(planes["keys"]), 17), np.int16)
    for wrong in (
        {"page": 128}, {"keys": planes["keys"][1:].copy()}, {"keys": many}, {"values": many},
        {"key_map": planes["key_map"][:, :1].copy()}, {"value_map": planes["value_map"][1:].copy()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            call(**wrong)
