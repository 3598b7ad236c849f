"""Codes of 2, 3, 4 and 8 bits: how they lie in bytes, and attention over them against its definition in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from coded_pages import RAGGED, agree_in_float64, agree_one_by_one, refused, softmax, table_of, with_extra
from kvfold import ops
from kvfold.ops import _cpu, dispatch
from kvfold.ops.codes import cpu, naive
from kvfold.ops.codes.packing import BITS, pack, quantise, unpack, width

WIDEST = _cpu.names()[0]
FLOATS = [name for name in _cpu.names() if not name.endswith("vnni")]
"""Sets that multiply codes as floats; the others: test_products.py."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
G = 3
SIZES = [(64, 64, 32), (16, 8, 4), (80, 96, 16), (128, 48, 48), (12, 20, 20), (192, 256, 64)]
"""Key size, value size, channels of a value that share a scale: units that are full, short and of several lengths."""


@pytest.fixture(params=FLOATS)
def instructions(request) -> Iterator[None]:
    """On every instruction set that this processor has and that multiplies floats."""
    _cpu.use(request.param)
    yield
    _cpu.use(WIDEST)


@pytest.fixture
def kernel_only(monkeypatch) -> None:
    """The CPU version must not hand its work on."""
    monkeypatch.setattr(naive, "attend_codes", refused)


@given(st.sampled_from(BITS), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_codes_pass_through_bytes(bits, size, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 1 << bits, (2, 3, size), dtype=np.uint8))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (2, 3, width(size, bits))
    assert torch.equal(unpack(packed, size, bits), codes.float())
    assert unpack(pack(codes[:0], bits), size, bits).shape == (0, 3, size)


@pytest.mark.parametrize("bits", BITS)
def test_a_unit_wastes_no_bit(bits):
    assert [width(size, bits) for size in (64, 128, 192)] == [8 * bits, 16 * bits, 24 * bits]
    assert width(1, bits) <= 8 and width(80, bits) <= 10 * bits + 4


def test_four_numbers_are_four_words_at_one_shift():
    words = pack(torch.arange(32, dtype=torch.uint8) % 16, 4).view(torch.int32)
    assert [[(word >> 4 * place) & 15 for word in words.tolist()] for place in range(8)] == [
        [(4 * place + i) % 16 for i in range(4)] for place in range(8)
    ]


def test_a_group_against_the_papers_numbers():
    codes, scale, zero = quantise(torch.tensor([[0.0, 1, 2, 3], [-1, 1, 0, 0], [5, 5, 5, 5]]), 1, torch.float32, 2)
    assert codes.tolist() == [[0, 1, 2, 3], [0, 3, 2, 2], [0, 0, 0, 0]]  # 1.5 goes to the even number
    assert zero.flatten().tolist() == [0, -1, 5] and scale[2] == 1
    assert_close(scale[:2].flatten(), torch.tensor([1, 2 / 3]))


@given(st.sampled_from(BITS), st.floats(1e-3, 1e3), st.floats(-100, 100), st.sampled_from(DTYPES))
def test_no_number_is_off_by_more_than_half_a_step(bits, size, shift, dtype):
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) * size + shift
    codes, scale, zero = quantise(x, 1, dtype, bits)
    error = (codes * scale.float() + zero.float() - x).abs()
    rounding = torch.finfo(dtype).eps * (x.abs().amax(1, keepdim=True) + scale.float() * 2**bits)
    assert (error <= scale.float() / 2 + rounding).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("extra", ["", "mass", "read", "holes"])
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_the_kernel_against_the_definition(bits, sizes, kind, extra):
    torch.manual_seed(0)
    page, (d, dv, _) = {"": 32, "mass": 8, "read": 128, "holes": 12}[extra], sizes
    table = table_of(RAGGED, bits, sizes, kind, page)
    q = torch.randn(len(RAGGED), 1, G, 1, d)
    read = with_extra(table, extra)
    mass = "log_mass" if extra == "mass" else None
    got = ops.attend_codes(q, table, d**-0.5, bits=bits, value_size=dv, mass=mass, read=read, weights=True)
    want = softmax(q, table, d**-0.5, bits, dv, mass is not None, read)
    agree_in_float64(got, want, 2e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.usefixtures("instructions", "kernel_only")
def test_heads_and_queries_of_a_row_are_answered_together(group, queries):
    torch.manual_seed(0)
    table = table_of([70, 5], 4, (64, 64, 32), torch.float16, 32)
    q = torch.randn(1, 2, group, queries, 64)
    got = ops.attend_codes(q, table, 0.1, bits=4, value_size=64)
    agree_one_by_one(got, q, lambda one: softmax(one, table, 0.1, 4, 64, False, None))


@pytest.mark.parametrize("bits", BITS)
def test_the_definition_in_torch_agrees(bits):
    torch.manual_seed(0)
    table = table_of([64, 32], bits, (64, 32, 16), torch.float16, 32)
    q = torch.randn(1, 2, G, 2, 64)
    fast = ops.attend_codes(q, table, 0.1, bits=bits, value_size=32, mass="log_mass", weights=True)
    with dispatch.use("naive"):
        slow = ops.attend_codes(q, table, 0.1, bits=bits, value_size=32, mass="log_mass", weights=True)
    for mine, theirs in zip(fast, slow, strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("queries", "sizes", "page", "options"),
    [
        (65, (16, 16, 16), 32, {}), (3, (18, 16, 16), 32, {}), (3, (16, 18, 18), 32, {}), (3, (16, 16, 2), 32, {}),
        (3, (16, 16, 16), 10, {}), (3, (16, 16, 16), 32, {"scale_kind": torch.float64}),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_fit_is_handed_on(queries, sizes, page, options, monkeypatch):
    asked = []
    run = naive.attend_codes
    monkeypatch.setattr(naive, "attend_codes", lambda *args, **more: asked.append(1) or run(*args, **more))
    table = table_of([2 * page], 4, sizes, options.get("scale_kind", torch.float16), page)
    q = torch.randn(1, 1, queries, 1, sizes[0])
    out = cpu.attend_codes(
        q, table, 0.1, bits=4, value_size=sizes[1], mass=None, read=None, compact=None, position="position",
        weights=False,
    )[0]  # fmt: skip
    assert asked and out.isfinite().all() and out.shape == (1, 1, queries, 1, sizes[1])


def test_arrays_that_do_not_belong_together_are_refused():
    table = table_of([32, 64], 4, (16, 16, 8), torch.float16, 32)
    pool = table.pool
    names = ("keys", "key_scale", "key_zero", "values", "value_scale", "value_zero")
    planes = {name: pool.array(name) for name in names}
    q, out, lse = np.zeros((2, 3, 16), np.float32), np.zeros((2, 3, 16), np.float32), np.zeros((2, 3), np.float32)

    def call(bits=4, **other):
        _cpu.attend_codes(
            q, bits, *(planes | other).values(), None, None, table.table, table.lengths, table.holes,
            table.hole_count, 32, 1.0, 1, out, lse, None,
        )  # fmt: skip

    call()
    for wrong in (
        {"bits": 5}, {"bits": 2}, {"keys": planes["keys"][:, :4].copy()}, {"values": planes["values"][1:].copy()},
        {"key_scale": planes["key_scale"][1:].copy()}, {"key_zero": planes["key_zero"][:, :8].copy()},
        {"value_zero": planes["value_zero"][:, :1].copy()}, {"value_scale": planes["value_scale"].view(np.uint16)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must"):
            call(**wrong)
