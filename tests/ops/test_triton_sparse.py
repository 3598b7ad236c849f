"""The Triton kernel over kept numbers and bitmaps against its definition in float64, interpreted or on a GPU."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

from test_sparse import softmax, table_of

from coded_pages import RAGGED, refused, with_extra
from interpreted import DEVICE, TOLERANCE, agree, interpreted, on_device  # noqa: F401  (a fixture)
from kvfold.ops.sparse import gpu, naive, triton_kernels  # noqa: F401  (the fixture finds it)
from kvfold.ops.sparse.packing import pack

pytestmark = pytest.mark.usefixtures("interpreted")
REST = {"compact": None, "position": "position"}
SIZES = [(64, 64, 21, 33), (16, 8, 2, 8), (80, 100, 80, 1), (13, 20, 5, 7), (192, 256, 100, 17)]
"""Key size, value size, and how many of each are kept."""
EXTRAS = (("mass", 12), ("read", 64), ("holes", 8))
"""What is special, and tokens of a page."""


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The Triton version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_sparse", refused)


def check(sizes, page, extra="", q_dtype=torch.float32, kind=torch.float32, lengths=RAGGED, queries=(3, 1)):
    torch.manual_seed(0)
    (d, dv, *_), mass = sizes, "log_mass" if extra == "mass" else None
    table = table_of(lengths, sizes, kind, page)
    q, read = torch.randn(len(lengths), 1, *queries, d).to(q_dtype), with_extra(table, extra)
    want = softmax(q.view(len(lengths), 1, -1, 1, d), table, d**-0.5, dv, mass is not None, read)
    got = gpu.attend_sparse(
        q.to(DEVICE), on_device(table), d**-0.5, value_size=dv, mass=mass, weights=True,
        read=None if read is None else read.to(DEVICE), **REST,
    )  # fmt: skip
    agree(got, want, q_dtype)


@pytest.mark.parametrize(
    ("sizes", "extra", "page"),
    [
        (sizes, *more)
        for i, sizes in enumerate(SIZES)
        for more in (("", 16), (("mass", 12), ("read", 64), ("holes", 8))[i % 3])
    ],
    ids=str,
)
@pytest.mark.usefixtures("kernel_only")
def test_the_kernel_against_the_definition(sizes, extra, page):
    check(sizes, page, extra)


@pytest.mark.parametrize("q_dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("kernel_only")
def test_awkward_lengths_and_narrow_numbers(q_dtype):
    check((64, 32, 33, 17), 16, "", q_dtype, q_dtype, [63, 100, 1000], (2, 3))


@pytest.mark.usefixtures("kernel_only")
def test_a_number_that_is_not_finite_is_seen_in_its_channel_alone():
    table, value = table_of([1], (16, 16, 2, 2), torch.float32, 4), torch.zeros(1, 16)
    value[0, 3], value[0, 9] = torch.nan, 2.0
    kept, maps = pack(value, 2)
    table.write(np.array([0]), np.array([0]), {"values": kept, "value_map": maps})
    out, _, _ = gpu.attend_sparse(
        torch.zeros(1, 1, 1, 1, 16, device=DEVICE), on_device(table), 0.1, value_size=16, mass=None, read=None,
        weights=False, **REST,
    )  # fmt: skip
    out = out.flatten()
    assert out[3].isnan() and out[9] == 2 and out[[i for i in range(16) if i not in (3, 9)]].eq(0).all()


@pytest.mark.usefixtures("unchecked")
def test_a_key_that_is_to_be_turned_is_handed_on(monkeypatch):
    monkeypatch.setattr(naive, "attend_sparse", lambda *args, **more: "handed on")
    table, q = table_of([20], (16, 16, 5, 5), torch.float32, 16), torch.zeros(1, 1, 1, 1, 16)
    rest = {"value_size": 16, "mass": None, "read": None, "weights": False, "position": "position"}
    assert gpu.attend_sparse(q, table, 0.1, compact=object(), **rest) == "handed on"
