"""Attention over 8-bit floats: the kernel against its definition in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from coded_pages import RAGGED, agree_in_float64, agree_one_by_one, refused, scattered, softmax_over, with_extra
from kvfold import ops
from kvfold.ops import _cpu, dispatch
from kvfold.ops.float8 import cpu, naive
from kvfold.pages import PageTable, Plane

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2]
G = 3
SIZES = [(64, 64), (16, 8), (80, 96), (12, 20), (192, 256), (4, 36)]


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The CPU version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_float8", refused)


def table_of(lengths: list[int], sizes: tuple[int, int], kind: torch.dtype, page: int) -> PageTable:
    """Random numbers on scattered pages; behind a row's tokens are bytes of NaN, and NaN for scales."""
    scales = {name: Plane(None, torch.float32) for name in ("key_scale", "value_scale")}
    planes = {"keys": Plane(sizes[0], torch.uint8), "values": Plane(sizes[1], torch.uint8), **scales}
    states = {name: (torch.rand(sum(lengths)) + 0.1) for name in scales}
    for name, size in zip(("keys", "values"), sizes, strict=True):
        states[name] = (torch.randn(sum(lengths), size) * 1.5).to(kind).view(torch.uint8)
    return scattered(planes, lengths, page, states)


def softmax(
    q: Tensor, table: PageTable, scale: float, kind: torch.dtype, mass: bool, read: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`softmax_over` bytes that torch widens."""

    def numbers(row: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
        planes = table.read(("keys", "values", "key_scale", "value_scale"), np.full(len(at), row), at)
        keys, values = (planes[name].view(kind).double() for name in ("keys", "values"))
        return keys * planes["key_scale"].double()[:, None], values * planes["value_scale"].double()[:, None]

    return softmax_over(q, table, scale, numbers, mass, read)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("extra", ["", "mass", "read", "holes"])
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_the_kernel_against_the_definition(sizes, kind, extra):
    torch.manual_seed(0)
    page, (d, _) = {"": 16, "mass": 4, "read": 64, "holes": 8}[extra], sizes
    table = table_of(RAGGED, sizes, kind, page)
    q = torch.randn(len(RAGGED), 1, G, 1, d)
    read = with_extra(table, extra)
    mass = "log_mass" if extra == "mass" else None
    got = ops.attend_float8(q, table, d**-0.5, kind=kind, mass=mass, read=read, weights=True)
    want = softmax(q, table, d**-0.5, kind, mass is not None, read)
    agree_in_float64(got, want, 3e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_heads_and_queries_of_a_row_are_answered_together(group, queries):
    torch.manual_seed(0)
    table = table_of([70, 5], (64, 64), KINDS[0], 16)
    q = torch.randn(1, 2, group, queries, 64)
    got = ops.attend_float8(q, table, 0.1, kind=KINDS[0])
    agree_one_by_one(got, q, lambda one: softmax(one, table, 0.1, KINDS[0], False, None))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_all_bytes_are_what_torch_makes_of_them(kind):
    """Of one token the answer is its value; its logit with a unit vector is a number of its key."""
    every = torch.arange(256, dtype=torch.uint8)
    table = table_of([1], (256, 256), kind, 4)
    table.write(np.array([0]), np.array([0]), {"values": every, "keys": torch.zeros(256, dtype=torch.uint8)})
    table.write(np.array([0]), np.array([0]), {"value_scale": torch.ones(1), "key_scale": torch.full((1,), 2.0)})
    out, *_ = ops.attend_float8(torch.zeros(1, 1, 1, 1, 256), table, 1.0, kind=kind)
    want = every.view(kind).float()
    assert torch.equal(out.flatten().nan_to_num(-1.0), want.nan_to_num(-1.0)) and want.isnan().any()
    for byte in (1, 7, 8, 0x7E, 0x80, 0x81, 0xFE if kind == KINDS[0] else 0xFB):
        table.write(np.array([0]), np.array([0]), {"keys": torch.full((1, 256), byte, dtype=torch.uint8)})
        q = torch.zeros(1, 1, 1, 1, 256)
        q[..., 200] = 1.0
        _, lse, _ = ops.attend_float8(q, table, 1.0, kind=kind)
        assert float(lse) == pytest.approx(2.0 * float(want[byte]), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_definition_in_torch_agrees(kind):
    torch.manual_seed(0)
    table = table_of([64, 32], (64, 32), kind, 16)
    q = torch.randn(1, 2, G, 2, 64)
    fast = ops.attend_float8(q, table, 0.1, kind=kind, mass="log_mass", weights=True)
    with dispatch.use("naive"):
        slow = ops.attend_float8(q, table, 0.1, kind=kind, mass="log_mass", weights=True)
    for mine, theirs in zip(fast, slow, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("queries", "sizes", "page"), [(65, (16, 16), 16), (3, (18, 16), 16), (3, (16, 18), 16), (3, (16, 16), 10)], ids=str
)
def test_what_does_not_fit_is_handed_on(queries, sizes, page, monkeypatch):
    asked = []
    run = naive.attend_float8
    monkeypatch.setattr(naive, "attend_float8", lambda *args, **more: asked.append(1) or run(*args, **more))
    table = table_of([2 * page], sizes, KINDS[0], page)
    q = torch.randn(1, 1, queries, 1, sizes[0])
    out = cpu.attend_float8(
        q, table, 0.1, kind=KINDS[0], mass=None, read=None, compact=None, position="position", weights=False
    )[0]
    assert asked and out.isfinite().all() and out.shape == (1, 1, queries, 1, sizes[1])


def test_arrays_that_do_not_belong_together_are_refused():
    table = table_of([32, 64], (16, 16), KINDS[0], 16)
    planes = {name: table.pool.array(name) for name in cpu.PLANES}
    q, out, lse = np.zeros((2, 3, 16), np.float32), np.zeros((2, 3, 16), np.float32), np.zeros((2, 3), np.float32)

    def call(page: int = 16, **other):
        _cpu.attend_float8(
            q, False, *(planes | other).values(), None, None, table.table, table.lengths, table.holes,
            table.hole_count, page, 1.0, 1, out, lse, None,
        )  # fmt: skip

    call()
    for wrong in (
        {"page": 128}, {"keys": planes["keys"][1:].copy()}, {"keys": planes["keys"][:, :12].copy()},
        {"values": planes["values"][:, :8].copy()}, {"key_scale": planes["key_scale"][1:].copy()},
        {"value_scale": np.concatenate([planes["value_scale"]] * 2, 1)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|fit"):
            call(**wrong)
