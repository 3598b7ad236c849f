"""attend, merge and causal: every version against the definition, and against torch.softmax on the full matrix."""

import importlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.ops import dispatch

SIZES = (1, 7, 63, 100, 257)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def tensors(
    q: int, t: int, d: int, h: int = 2, group: int = 1, dv: int | None = None, seed: int = 0, dtype=torch.float32
):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((2, h * group, q, d), (2, h, t, d), (2, h, t, d if dv is None else dv))
    return [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]


def softmax_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, with torch.softmax."""
    logits = q.double() @ k.double().transpose(-1, -2) * scale + (0 if bias is None else bias.double())
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    bound = TOLERANCE[dtype]
    assert_close(got[0].double(), expected[0], atol=bound, rtol=bound, msg=lambda m: f"out: {m}")
    exact = 2e-5 if dtype == torch.float32 else 1e-4  # the fused kernel has a faster exp for half precision
    assert_close(got[1].double(), expected[1], atol=exact, rtol=exact, msg=lambda m: f"lse: {m}")


@pytest.mark.parametrize("version", dispatch.versions("attend"))
@pytest.mark.parametrize("t", SIZES)
@pytest.mark.parametrize(("n", "d"), [(1, 16), (3, 64), (7, 16)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attend(version, t, n, d, dtype):
    q, k, v = tensors(n, t, d, dtype=dtype)
    mass = torch.rand(2, 2, 1, t, generator=torch.Generator().manual_seed(1)) * 8  # log of up to 3,000 tokens
    for bias in (None, mass, mass.masked_fill(torch.arange(t) % 5 == 3, -torch.inf)):
        with dispatch.use(version):
            got = ops.attend(q, k, v, d**-0.5, bias)
        check(got, softmax_attend(q, k, v, d**-0.5, bias), dtype)


@pytest.mark.parametrize("version", dispatch.versions("attend"))
def test_attend_with_a_bias_for_each_query_and_other_value_sizes(version):
    q, k, v = tensors(7, 63, 16, dv=24)
    bias = torch.randn(2, 2, 7, 63, generator=torch.Generator().manual_seed(2))
    with dispatch.use(version):
        check(ops.attend(q, k, v, 0.3, bias), softmax_attend(q, k, v, 0.3, bias), torch.float32)


@pytest.mark.parametrize("version", dispatch.versions("attend"))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_query_that_sees_nothing_gives_zero(version, dtype):
    q, k, v = tensors(3, 7, 16, dtype=dtype)
    bias = torch.zeros(2, 2, 1, 7)
    bias[0, 1] = -torch.inf
    with dispatch.use(version):
        out, lse = ops.attend(q, k, v, 0.25, bias)
        nothing = ops.attend(q, k[:, :, :0], v[:, :, :0], 0.25)
    assert (out[0, 1] == 0).all() and (lse[0, 1] == -torch.inf).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all() and (out[0, 0] != 0).any()
    assert (nothing[0] == 0).all() and (nothing[1] == -torch.inf).all() and nothing[0].shape == q.shape


def test_the_bias_keeps_its_precision_in_bf16():
    """The log of 1,000 tokens is 6.9078; rounded to bf16 it would be 6.90625, and of 700 it would be 2 % off."""
    q, k, v = tensors(1, 7, 16, dtype=torch.bfloat16)
    bias = torch.full((2, 2, 1, 7), 700.0).log()
    _, plain = ops.attend(q, k, v, 0.25)
    _, heavy = ops.attend(q, k, v, 0.25, bias)
    assert_close((heavy - plain).exp(), torch.full_like(plain, 700.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("queries", [1, 7])
def test_blocks_of_queries_are_the_whole(queries, monkeypatch):
    q, k, v = tensors(7, 63, 16)
    bias = torch.randn(2, 2, queries, 63, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(importlib.import_module("kvfold.ops.attend.naive"), "BLOCK_ELEMENTS", 3 * 2 * 2 * 63)
    with dispatch.use("naive"):
        check(ops.attend(q, k, v, 0.3, bias), softmax_attend(q, k, v, 0.3, bias), torch.float32)
        assert ops.attend(q[:, :, :0], k, v, 0.3)[0].shape == (2, 2, 0, 16)


@settings(max_examples=30, deadline=None)
@given(t=st.integers(2, 40), cuts=st.lists(st.integers(0, 40), max_size=4), seed=st.integers(0, 99))
def test_the_parts_of_any_split_merge_to_the_whole(t, cuts, seed):
    q, k, v = tensors(3, t, 8, seed=seed)
    bias = torch.randn(2, 2, 1, t, generator=torch.Generator().manual_seed(seed))
    edges = [0, *sorted(min(cut, t) for cut in cuts), t]  # some parts are empty
    parts = [ops.attend(q, k[:, :, i:j], v[:, :, i:j], 0.4, bias[..., i:j]) for i, j in pairwise(edges)]
    out, lse = ops.merge(parts)
    expected = softmax_attend(q, k, v, 0.4, bias)
    check((out, lse), expected, torch.float32)


def test_merging_parts_of_which_one_or_all_see_nothing():
    q, k, v = tensors(2, 9, 8)
    whole = ops.attend(q, k, v, 0.4)
    empty = (torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf))
    for got in (ops.merge([whole, empty]), ops.merge([empty, whole])):
        assert_close(got[0], whole[0]), assert_close(got[1], whole[1])
    out, lse = ops.merge([empty, empty])
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parts_merge_in_float32(dtype):
    q, k, v = tensors(3, 100, 16, dtype=dtype)
    parts = [ops.attend(q, k[:, :, i : i + 10], v[:, :, i : i + 10], 0.25) for i in range(0, 100, 10)]
    check(ops.merge(parts), softmax_attend(q, k, v, 0.25, None), dtype)


@pytest.mark.parametrize("version", ["naive", "sdpa"])
@pytest.mark.parametrize("t", SIZES)
@pytest.mark.parametrize(("group", "d"), [(1, 64), (3, 16)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_causal(version, t, group, d, dtype):
    q, k, v = tensors(t, t, d, group=group, dtype=dtype)
    future = torch.zeros(t, t).masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf)
    wide = [x.repeat_interleave(group, 1) for x in (k, v)]
    with dispatch.use(version):
        got = ops.causal(q, k, v, d**-0.5)[:2]
    check(got, softmax_attend(q, *wide, d**-0.5, future), dtype)


@pytest.mark.parametrize("version", ["naive", "sdpa"])
def test_causal_with_other_value_sizes(version):
    q, k, v = tensors(63, 63, 16, group=3, dv=24)
    future = torch.zeros(63, 63).masked_fill(torch.ones(63, 63).triu(1).bool(), -torch.inf)
    with dispatch.use(version):
        got = ops.causal(q, k, v, 0.25)[:2]
    check(got, softmax_attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), 0.25, future), torch.float32)


def test_what_comes_later_does_not_matter_even_if_it_is_nan():
    """With the definition; the fused kernel multiplies masked weights (0) by the values of its block."""
    q, k, v = tensors(20, 20, 16)
    clean = ops.causal(q, k, v, 0.25)[0]
    k[:, :, 15:] = torch.nan
    with dispatch.use("naive"):
        assert_close(ops.causal(q, k, v, 0.25)[0][:, :, :15], clean[:, :, :15])
