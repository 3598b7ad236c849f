"""The Triton kernel over tokens in codes against its definition in float64, in the interpreter or on a GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from test_token_codes import levels, named, softmax, table_of

from coded_pages import RAGGED, refused, with_extra
from interpreted import DEVICE, TOLERANCE, agree, interpreted, on_device  # noqa: F401  (a fixture)
from kvfold.ops.tokens import Coding, gpu, naive, triton_kernels  # noqa: F401  (the fixture finds it)

pytestmark = pytest.mark.usefixtures("interpreted")
CASES = [
    (levels(64, 2), levels(64, 3)), (levels(80, 4), levels(12, 2)), (Coding(64, 2, groups=2), Coding(48, 8)),
    (Coding(12, 8, groups=3), Coding(192, 3, groups=2)), (levels(16, 3), Coding(64, 4, groups=4)),
    (Coding(128, 4, groups=8), levels(100, 4)),
]  # fmt: skip
"""Full and short units, one group and several, levels and steps."""
EXTRAS = (("mass", 12), ("read", 64), ("holes", 8))
"""What is special, and tokens of a page."""


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The Triton version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_tokens", refused)


def check(coding, page, extra="", q_dtype=torch.float32, kind=torch.float32, queries=(3, 1)):
    torch.manual_seed(0)
    (keys, values), mass = coding, "log_mass" if extra == "mass" else None
    table = table_of(keys, values, kind, page)
    q, read = torch.randn(len(RAGGED), 1, *queries, keys.size).to(q_dtype), with_extra(table, extra)
    flat = q.view(len(RAGGED), 1, -1, 1, keys.size)
    want = softmax(flat, table, 0.3, keys, values, mass is not None, read)
    got = gpu.attend_tokens(
        q.to(DEVICE), on_device(table), 0.3, keys=keys, values=values, mass=mass, weights=True,
        read=None if read is None else read.to(DEVICE),
    )  # fmt: skip
    agree(got, want, q_dtype)


@pytest.mark.parametrize(
    ("coding", "extra", "page"),
    [
        (case, *more)
        for i, case in enumerate(CASES)
        for more in (("", 16), (("mass", 12), ("read", 64), ("holes", 8))[i % 3])
    ],
    ids=lambda x: named(x) if isinstance(x, tuple) else str(x),
)
@pytest.mark.usefixtures("kernel_only")
def test_the_kernel_against_the_definition(coding, extra, page):
    check(coding, page, extra)


@pytest.mark.parametrize("q_dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_several_queries_and_narrow_numbers(q_dtype):
    check(CASES[3], 16, "", q_dtype, torch.bfloat16, (2, 3))


def test_more_queries_than_a_tile_takes_are_handed_on(monkeypatch):
    asked, run = [], naive.attend_tokens
    monkeypatch.setattr(naive, "attend_tokens", lambda *args, **more: asked.append(1) or run(*args, **more))
    keys, values = CASES[0]
    table = on_device(table_of(keys, values, torch.float32, 16, poison=False))
    q = torch.randn(len(RAGGED), 1, 5, 13, keys.size, device=DEVICE)
    out, _, _ = gpu.attend_tokens(q, table, 0.3, keys=keys, values=values, mass=None, read=None, weights=False)
    assert asked and out.isfinite().all() and out.shape == (len(RAGGED), 1, 5, 13, values.size)
