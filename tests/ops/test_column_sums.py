"""column_sums and window_attention: every version against torch.softmax on the full matrix."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.ops import dispatch

VERSIONS = dispatch.versions("column_sums")


def probabilities(
    q: Tensor, k: Tensor, scale: float, start: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(B, H, G, Q, T) by torch.softmax, and the log-sum-exp (B, Hq, Q); query i sees keys 0..start + i."""
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.view(b, h, hq // h, n, d).double(), k.double()) * scale
    if bias is not None:
        logits += bias[:, :, None, None].double()
    own = start[:, :, None, None, None] + torch.arange(n)[:, None]
    logits = logits.masked_fill(torch.arange(t) > own, -torch.inf)
    return logits.softmax(-1), logits.logsumexp(-1).view(b, hq, n).float()


def tensors(n: int, t: int, group: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(t)
    return tuple(torch.randn(2, h, x, d, generator=rng).to(dtype) for h, x in ((2 * group, n), (2, t)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("t", [1, 7, 63, 100, 257, 600])
@pytest.mark.parametrize(("group", "d"), [(1, 64), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_column_sums_of_a_prompt(version, t, group, d, dtype):
    q, k = tensors(t, t, group, d, dtype)
    start = torch.zeros(2, 2, dtype=torch.int64)
    probs, lse = probabilities(q, k, d**-0.5, start)
    with dispatch.use(version):
        got = ops.column_sums(q, k, lse, d**-0.5, start)
    assert got.dtype == torch.float32
    assert_close(got.double(), probs.sum((2, 3)), atol=1e-5 * t**0.5, rtol=1e-4)
    # H2O, oracle 3: before any eviction the scores of a head sum to T, those of a group of G heads to G * T.
    assert_close(got.sum(-1), torch.full((2, 2), float(group * t)), atol=0, rtol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 63), (7, 100), (63, 100), (300, 600)])
@pytest.mark.parametrize("group", [1, 3])
def test_column_sums_of_a_turn_with_ragged_starts_bias_and_silent_queries(version, n, t, group):
    q, k = tensors(n, t, group, 16)
    rng = torch.Generator().manual_seed(7)
    start = torch.randint(0, t - n + 1, (2, 2), generator=rng)
    bias = torch.rand(2, 2, t, generator=rng) * 3
    probs, lse = probabilities(q, k, 0.25, start, bias)
    silent = torch.rand(2, n, generator=rng) < 0.3
    probs = probs.masked_fill(silent[:, None, None, :, None], 0.0)
    lse = lse.masked_fill(silent[:, None], torch.inf)
    with dispatch.use(version):
        got = ops.column_sums(q, k, lse, 0.25, start, bias)
    assert_close(got.double(), probs.sum((2, 3)), atol=1e-4, rtol=1e-4)
    after = torch.arange(t) >= start[..., None] + n
    assert (got[after] == 0).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_nan_in_silent_queries_does_not_matter_and_in_empty_slots_stays_there(version):
    q, k = tensors(20, 30, 3, 16)
    start = torch.full((2, 2), 10)
    probs, lse = probabilities(q, k, 0.25, start)
    silent = torch.arange(20) < 6
    probs[:, :, :, silent] = 0.0
    lse[..., silent] = torch.inf
    q[:, :, silent] = torch.nan
    k[:, :, 4] = torch.nan  # an empty slot: nobody's lse counts it
    with dispatch.use(version):
        got = ops.column_sums(q, k, lse, 0.25, start)
    others = torch.arange(30) != 4
    assert_close(got[..., others].double(), probs.sum((2, 3))[..., others], atol=1e-4, rtol=1e-4)


def test_the_block_size_does_not_matter(monkeypatch):
    from kvfold.ops.scores import blocked

    q, k = tensors(257, 257, 3, 16)
    start = torch.zeros(2, 2, dtype=torch.int64)
    _, lse = probabilities(q, k, 0.25, start)
    wide = blocked.column_sums(q, k, lse, 0.25, start)
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 1)  # 16 queries at a time
    assert_close(blocked.column_sums(q, k, lse, 0.25, start), wide, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("t", [1, 7, 63, 100])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_window_attention(t, group, dtype):
    w = min(5, t)
    q, k = tensors(w, t, group, 16, dtype)
    start = torch.full((2, 2), t - w)
    bias = torch.rand(2, 2, t, generator=torch.Generator().manual_seed(3)) * 3
    seen = (torch.arange(t) <= start[..., None, None] + torch.arange(w)[:, None]).expand(2, 2, w, t)
    probs, _ = probabilities(q, k, 0.25, start, bias)
    got = ops.window_attention(q.view(2, 2, group, w, 16), k, 0.25, seen, bias)
    assert got.dtype == torch.float32
    assert_close(got.double(), probs, atol=1e-6, rtol=1e-4)


def test_window_attention_neither_reads_unseen_keys_nor_divides_by_zero():
    q, k = tensors(3, 9, 1, 16)
    seen = torch.ones(2, 2, 3, 9, dtype=torch.bool)
    seen[..., 4] = False
    seen[0, 0, 1] = False
    clean = ops.window_attention(q[:, :, None], k, 0.25, seen)
    k[:, :, 4] = torch.nan
    poisoned = ops.window_attention(q[:, :, None], k, 0.25, seen)
    assert_close(poisoned, clean, atol=0, rtol=0)
    assert (poisoned[0, 0, 0, 1] == 0).all()
    sums = poisoned.sum(-1)
    sums[0, 0, 0, 1] = 1.0
    assert_close(sums, torch.ones_like(sums))
