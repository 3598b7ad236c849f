"""Causal attention of the last queries alone, and within a window: all versions against the definition."""

import pytest
import torch
from torch import Tensor

from kvfold import ops
from kvfold.layer.parts import Parts, shares
from kvfold.ops import dispatch

VERSIONS = ["cpu", "sdpa", "naive"]


def states(b: int, h: int, g: int, n: int, t: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(b, heads, count, d, generator=generator).to(dtype) for heads, count in ((h * g, n), (h, t), (h, t))
    ]


def defined(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, weights (B, H, G, Q, T)) in float64."""
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    keys, asked = torch.arange(t), torch.arange(t - n, t)[:, None]
    seen = (keys <= asked) & ((keys > asked - window) if window else torch.tensor(True))
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.double().view(b, h, hq // h, n, d), k.double()) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1)
    out = torch.einsum("bhgqt,bhtd->bhgqd", weights, v.double())
    return out.reshape(b, hq, n, -1), logits.logsumexp(-1).reshape(b, hq, n), weights


@pytest.mark.parametrize("window", [0, 1, 7, 64, 300])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 70), (63, 100), (130, 130), (5, 260), (200, 263)])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_last_queries_see_what_came_before(version, n, t, window):
    q, k, v = states(2, 2, 3, n, t, 16)
    counted = torch.rand(n)
    with dispatch.use(version):
        out, lse, sums = ops.causal(q, k, v, 0.3, window=window, sums=True, shares=counted)
    expected = defined(q, k, v, 0.3, window)
    torch.testing.assert_close(out.double(), expected[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected[1], atol=2e-5, rtol=1e-5)
    if sums is not None:
        given = (expected[2] * counted.double()[:, None]).sum((2, 3))
        torch.testing.assert_close(sums.double(), given, atol=1e-4, rtol=1e-5)
    assert sums is not None or version == "sdpa"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(version, dtype):
    q, k, v = states(1, 2, 2, 40, 90, 16, dtype)
    with dispatch.use(version):
        out, lse, _ = ops.causal(q, k, v, 0.25, window=20)
    expected = defined(q, k, v, 0.25, 20)
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected[0], atol=0.03, rtol=0.03)


@pytest.mark.parametrize("window", [0, 6])
def test_rows_with_padding_in_parts(window):
    q, k, v = states(2, 2, 2, 50, 50, 16)
    valid = torch.arange(50) >= torch.tensor([[0], [13]])
    whole = ops.causal_rows(q, k, v, valid, 0.3, window=window, sums=True, shares=shares(valid, 0.5))
    parts, counted = Parts(50, valid), shares(valid, 0.5)
    for stop in (9, 30, 50):
        parts.reach(stop)
        here = slice(parts.start, stop)
        out, lse, sums = ops.causal_rows(
            q[:, :, here], k[:, :, :stop], v[:, :, :stop], valid[:, :stop], 0.3, window=window, sums=True,
            shares=parts.of(counted),
        )  # fmt: skip
        parts.put(out=out, lse=lse)
        parts.add(sums)
    for name, expected in zip(("out", "lse"), whole, strict=False):
        torch.testing.assert_close(parts.so_far(name), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.sums(), whole[2], atol=1e-5, rtol=1e-5)


def test_sums_that_one_part_can_not_give_are_nobodys():
    parts = Parts(6)
    for stop, sums in ((2, torch.ones(1, 1, 2)), (4, None), (6, torch.ones(1, 1, 6))):
        parts.reach(stop)
        parts.add(sums)
    assert parts.sums() is None


def test_shares_fade_with_the_distance_to_a_rows_last():
    valid = torch.tensor([[False, True, True], [True, True, True]])
    found = shares(valid, 0.5)
    expected = torch.exp(-torch.tensor([[1.0, 0.0], [2.0 / 3 * 2, 1.0 / 3 * 2]]))
    torch.testing.assert_close(found[0, 1:], expected[0])
    torch.testing.assert_close(found[1, :2], expected[1])
    assert bool((shares(valid, float("inf"))[valid] == 1).all())
