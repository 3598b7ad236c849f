"""The most similar vector: the kernel against its definition, awkward sizes, ragged heads, NaN where nobody is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold import ops
from kvfold.ops import dispatch
from kvfold.ops.alike import naive

WIDTHS = {1: (5,), 2: (16, 20), 3: (8, 8, 8)}


def drawn(n: int, m: int, kinds: int, rng: torch.Generator):
    """Small whole numbers, so that many tie, and products are exact."""
    pairs = [[torch.randint(-2, 3, (2, 3, t, d), generator=rng).float() for d in WIDTHS[kinds]] for t in (n, m)]
    asks, there = (torch.randint(0, t + 1, (2, 3), generator=rng) for t in (n, m))
    asks[0, 0], there[0, 0], there[1, 2] = n, m, 0
    for vectors, counts in zip(pairs, (asks, there), strict=True):
        for x in vectors:
            x[torch.arange(x.shape[2]) >= counts[..., None]] = torch.nan
    return *pairs, asks, there


@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([0, 1, 7, 50, 131]), m=st.sampled_from([0, 1, 15, 64, 65, 300]), kinds=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_against_a_loop(n, m, kinds, seed):
    asking, others, asks, there = drawn(n, m, kinds, torch.Generator().manual_seed(seed))
    found = {}
    for version in ("naive", "cpu"):
        with dispatch.use(version):
            found[version] = ops.most_alike(asking, others, asks, there)
    for best, first in found.values():
        assert best.shape == first.shape == (2, 3, n)
        for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
            a, t = int(asks[b, h]), int(there[b, h])
            assert best[b, h, a:].isneginf().all() and (first[b, h, a:] == 0).all()
            if not t:
                assert best[b, h].isneginf().all() and (first[b, h] == 0).all()
            elif a:
                products = [x[b, h, :a] @ y[b, h, :t].T for x, y in zip(asking, others, strict=True)]
                alike = products[0] if kinds == 1 else torch.stack([p.clamp(min=0) for p in products]).prod(0)
                high = alike.amax(-1)
                assert torch.equal(best[b, h, :a], high)
                assert torch.equal(first[b, h, :a], (alike == high[:, None]).int().argmax(-1))


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_and_narrow_types_that_fit_the_kernel(threads, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    asking, others = ([torch.randn(1, 2, n, 24, generator=rng)] for n in (200, 500))
    asks, there = torch.tensor([[200, 150]]), torch.tensor([[500, 3]])
    with dispatch.use("naive"):
        best, first = ops.most_alike(asking, others, asks, there)
    monkeypatch.setattr(naive, "most_alike", None)  # the kernel takes it, or this fails
    torch.set_num_threads(threads)
    try:
        got, which = ops.most_alike(asking, others, asks, there)
        half = [[x.bfloat16() for x in each] for each in (asking, others)]
        rough, _ = ops.most_alike(*half, asks, there)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(which, first)
    assert_close(got, best, atol=1e-5, rtol=1e-5)
    assert_close(rough, best, atol=0.2, rtol=0.05)


@pytest.mark.parametrize("version", ["naive", "cpu"])
def test_no_rows(version):
    none, counts = [torch.zeros(0, 2, 3, 4)], torch.zeros(0, 2, dtype=torch.int64)
    with dispatch.use(version):
        best, first = ops.most_alike(none, none, counts, counts)
    assert best.shape == first.shape == (0, 2, 3)
