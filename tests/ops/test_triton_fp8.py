"""The Triton kernel over numbers of eight bits against their definition in float64, in the interpreter or on a GPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from coded_pages import RAGGED, refused, scattered, softmax_over, with_extra
from interpreted import DEVICE, TOLERANCE, agree, interpreted, on_device  # noqa: F401  (a fixture)
from kvfold import ops
from kvfold.ops import dispatch
from kvfold.ops.float8 import gpu, naive, triton_kernels  # noqa: F401  (the fixture finds it)
from kvfold.pages import PageTable, Plane

pytestmark = pytest.mark.usefixtures("interpreted")
REST = {"kind": torch.float8_e4m3fn, "compact": None, "position": "position"}


def table_of(lengths: list[int], d: int, dv: int, page: int) -> PageTable:
    """Every byte that is a number, at random, on scattered pages; behind a row's tokens are NaN."""
    total, scale = sum(lengths), Plane(None, torch.float32)
    sizes = {"keys": Plane(d, torch.uint8), "values": Plane(dv, torch.uint8)}
    states = {}
    for name, size in (("keys", d), ("values", dv)):
        codes = torch.randint(0, 254, (total, size), dtype=torch.uint8)
        states[name] = codes + (codes >= 127).byte()  # 127 and 255 are NaN
        states[f"{name[:-1]}_scale"] = (torch.rand(total) + 0.1) / 448
    return scattered(sizes | {"key_scale": scale, "value_scale": scale}, lengths, page, states)


def softmax(q: Tensor, table: PageTable, scale: float, mass: bool, read: Tensor | None) -> tuple[Tensor, ...]:
    """`softmax_over` what bytes stand for."""

    def numbers(row: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
        planes = table.read(table.pool.specs, np.full(len(at), row), at)
        keys, values = (
            planes[name].view(torch.float8_e4m3fn).double() * planes[f"{name[:-1]}_scale"].double()[:, None]
            for name in ("keys", "values")
        )
        return keys, values

    return softmax_over(q, table, scale, numbers, mass, read)


def check(run, d: int, dv: int, page: int, extra: str = "", q_dtype=torch.float32, lengths=RAGGED, queries=(3, 1)):
    table, mass = table_of(lengths, d, dv, page), "log_mass" if extra == "mass" else None
    q, read = torch.randn(len(lengths), 1, *queries, d).to(q_dtype), with_extra(table, extra)
    want = softmax(q.view(len(lengths), 1, -1, 1, d), table, 0.5, mass is not None, read)
    read = None if read is None else read.to(DEVICE)
    agree(run(q.to(DEVICE), on_device(table), 0.5, mass=mass, read=read, weights=True, **REST), want, q_dtype)


@pytest.mark.parametrize(
    ("d", "dv", "page", "extra"),
    [(64, 64, 16, ""), (16, 100, 12, "mass"), (20, 256, 64, "read"), (63, 8, 8, "holes"), (256, 12, 10, "")],
)
def test_the_kernel_against_the_definition(d, dv, page, extra, monkeypatch):
    monkeypatch.setattr(naive, "attend_float8", refused)
    check(gpu.attend_float8, d, dv, page, extra)


@pytest.mark.parametrize("q_dtype", TOLERANCE, ids=str)
def test_awkward_lengths_and_narrow_queries(q_dtype, monkeypatch):
    monkeypatch.setattr(naive, "attend_float8", refused)
    check(gpu.attend_float8, 64, 32, 16, "", q_dtype, [63, 100, 1000], (2, 3))


def test_the_definition_itself():
    table = table_of([37, 64], 16, 24, 16)
    for plane in table.pool.planes.values():  # plain torch multiplies what is behind a row by zero
        plane.copy_(plane.nan_to_num(0.0) if plane.dtype.is_floating_point else torch.where(plane == 255, 0, plane))
    q = torch.randn(2, 1, 3, 1, 16)
    want = softmax(q, table, 0.5, True, None)
    with dispatch.use("naive"):
        found = ops.attend_float8(q, table, 0.5, kind=torch.float8_e4m3fn, mass="log_mass", weights=True)
        agree(found, want, torch.float32)


def test_all_bytes_are_what_torch_says():
    """Each of the 256 as a value that takes all the weight; two of them are NaN."""
    codes = torch.arange(256, dtype=torch.uint8)
    table = scattered(
        {
            "keys": Plane(16, torch.uint8), "values": Plane(256, torch.uint8), "key_scale": Plane(None, torch.float32),
            "value_scale": Plane(None, torch.float32),
        },
        [1], 16,
        {
            "keys": torch.zeros(1, 16, dtype=torch.uint8), "values": codes[None],
            "key_scale": torch.ones(1, dtype=torch.float32), "value_scale": torch.ones(1, dtype=torch.float32),
        },
    )  # fmt: skip
    q = torch.zeros(1, 1, 1, 1, 16, device=DEVICE)
    out, _, _ = gpu.attend_float8(q, on_device(table), 1.0, mass=None, read=None, weights=False, **REST)
    want = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.flatten().cpu().nan_to_num(999.0), want.nan_to_num(999.0))


@pytest.mark.usefixtures("unchecked")
def test_keys_that_are_to_be_turned_are_handed_on(monkeypatch):
    monkeypatch.setattr(naive, "attend_float8", lambda *args, **more: "handed on")
    table, q = table_of([20], 16, 16, 16), torch.zeros(1, 1, 1, 1, 16)
    rest = {"kind": torch.float8_e4m3fn, "mass": None, "read": None, "weights": False, "position": "position"}
    assert gpu.attend_float8(q, table, 0.1, compact=object(), **rest) == "handed on"
    rest["kind"] = torch.float8_e5m2  # the kernel reads e4m3 alone
    assert gpu.attend_float8(q, table, 0.1, compact=None, **rest) == "handed on"
