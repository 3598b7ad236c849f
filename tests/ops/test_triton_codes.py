"""The Triton kernel over pages of codes against its definition in float64, in the interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from coded_pages import RAGGED, refused, softmax, table_of, with_extra
from interpreted import DEVICE, TOLERANCE, agree, interpreted, on_device  # noqa: F401  (a fixture)
from kvfold.ops.codes import gpu, naive, triton_kernels  # noqa: F401  (the fixture finds it)

pytestmark = pytest.mark.usefixtures("interpreted")
REST = {"compact": None, "position": "position"}
CASES = [
    (2, (64, 64, 32), 32), (3, (80, 96, 16), 8), (4, (12, 20, 20), 12), (8, (128, 48, 48), 16), (3, (16, 8, 4), 64),
    (4, (192, 256, 64), 32), (2, (20, 72, 24), 16), (8, (12, 100, 20), 10),
]  # fmt: skip
"""Bits, (key size, value size, channels that share a scale), tokens of a page: full and short units and tiles."""


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The Triton version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_codes", refused)


def check(bits, sizes, page, extra="", q_dtype=torch.float32, kind=torch.float32, lengths=RAGGED, queries=(3, 1)):
    torch.manual_seed(0)
    (d, dv, _), mass = sizes, "log_mass" if extra == "mass" else None
    table = table_of(lengths, bits, sizes, kind, page)
    q, read = torch.randn(len(lengths), 1, *queries, d).to(q_dtype), with_extra(table, extra)
    flat = q.view(len(lengths), 1, -1, 1, d)
    want = softmax(flat, table, d**-0.5, bits, dv, mass is not None, read)
    got = gpu.attend_codes(
        q.to(DEVICE), on_device(table), d**-0.5, bits=bits, value_size=dv, mass=mass, weights=True,
        read=None if read is None else read.to(DEVICE), **REST,
    )  # fmt: skip
    agree(got, want, q_dtype)


@pytest.mark.parametrize(
    ("bits", "sizes", "page", "extra"),
    [(*case, extra) for i, case in enumerate(CASES) for extra in ("", ("mass", "read", "holes")[i % 3])], ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("kernel_only")
def test_the_kernel_against_the_definition(bits, sizes, page, extra):
    check(bits, sizes, page, extra)


@pytest.mark.parametrize("q_dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_awkward_lengths_and_narrow_numbers(q_dtype):
    check(4, (64, 32, 32), 32, "", q_dtype, torch.float16, [63, 100, 1000], (2, 3))


def test_what_is_left_out_is_not_read():
    table, q = table_of([40], 4, (16, 16, 16), torch.float32, 8), torch.randn(1, 1, 1, 1, 16)
    read = torch.arange(40).view(1, 1, 40) % 3 > 0
    want = softmax(q, table, 1.0, 4, 16, False, read)
    for name in ("value_scale", "value_zero", "log_mass"):
        plane, slots = table.pool.planes[name], (~read[0, 0]).nonzero()[:, 0]
        plane[torch.from_numpy(table.table[0].copy())[slots // 8].long(), slots % 8] = torch.nan
    got = gpu.attend_codes(
        q.to(DEVICE), on_device(table), 1.0, bits=4, value_size=16, mass=None, read=read.to(DEVICE), weights=True,
        **REST,
    )  # fmt: skip
    agree(got, want, torch.float32)


@pytest.mark.parametrize(
    ("queries", "sizes", "kind", "mass"),
    [
        (65, (16, 16, 16), torch.float16, torch.float32), (3, (260, 16, 16), torch.float16, torch.float32),
        (3, (16, 260, 20), torch.float16, torch.float32), (3, (16, 16, 16), torch.float64, torch.float32),
        (3, (16, 16, 16), torch.float16, torch.float64),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_handed_on(queries, sizes, kind, mass, monkeypatch):
    asked, run = [], naive.attend_codes
    monkeypatch.setattr(naive, "attend_codes", lambda *args, **more: asked.append(1) or run(*args, **more))
    table = table_of([64], 4, sizes, kind, 32)
    table.pool.planes["log_mass"] = table.pool.planes["log_mass"].to(mass)
    table.pool.specs["log_mass"] = type(table.pool.specs["log_mass"])(None, mass)
    out, _, _ = gpu.attend_codes(
        torch.randn(1, 1, queries, 1, sizes[0], device=DEVICE), on_device(table), 0.1, bits=4, value_size=sizes[1],
        mass="log_mass", read=None, weights=False, **REST,
    )  # fmt: skip
    assert asked and out.isfinite().all() and out.shape == (1, 1, queries, 1, sizes[1])
