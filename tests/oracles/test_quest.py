"""Quest against its card: the bound, which pages are read, and what follows of it."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Indexed, Spec
from kvfold.methods.quest import Quest
from kvfold.selectors import Bounds, Selection, Vote
from kvfold.testing import steps as forced
from models import dynamic, feed, follow, grow, reference, subject, tokens


def bounds(keys: torch.Tensor, page: int) -> torch.Tensor:
    """What is remembered of keys (B, H, T, D), from scratch."""
    b, h, _, d = keys.shape
    held = Bounds(page).open(Spec(b, h, d, d, keys.dtype, keys.device))
    held.extend(of(keys), np.zeros((b, h), dtype=np.int64))
    return held


def of(keys: torch.Tensor, valid: torch.Tensor | None = None) -> Chunk:
    return Chunk(keys, keys, torch.ones(keys.shape[:3], dtype=torch.bool) if valid is None else valid)


def pages(t: int, page: int, b: int = 1, h: int = 1) -> np.ndarray:
    return np.full((b, h), -(-t // page))


def test_oracle_1_no_query_finds_more_in_a_page():
    rng = torch.Generator().manual_seed(0)
    wide, q = torch.randn(2, 3, 53, 8, generator=rng), torch.randn(2, 3, 4, 8, generator=rng)
    keys = wide.bfloat16().float()  # of which 16 bits hold all
    scores = bounds(keys, 16).scores(q, pages(53, 16, 2, 3))
    products = torch.einsum("bhgd,bhtd->bhgt", q, keys)
    for n in range(4):
        assert (scores[..., n] >= products[..., 16 * n : 16 * n + 16].amax(-1) - 1e-5).all()
    least, most = keys[:, :, :16].amin(2), keys[:, :, :16].amax(2)
    assert_close(scores[..., 0], torch.maximum(q * least[:, :, None], q * most[:, :, None]).sum(-1))
    rounded, all_of = bounds(wide, 16).scores(q, pages(53, 16, 2, 3)), torch.einsum("bhgd,bhtd->bhgt", q, wide)
    assert all((rounded[..., n] >= all_of[..., 16 * n : 16 * n + 16].amax(-1) - 1e-5).all() for n in range(4))
    assert_close(rounded, scores, atol=0.0, rtol=0.02)


TINY = torch.tensor([[1.0, 0], [0, 1], [2, 2], [0, 0], [3, 3], [3, 3], [0, 0], [0, 0]])[None, None]


def test_oracle_2_a_loose_bound_wins():
    held, q = bounds(TINY, 2), torch.tensor([[[[1.0, -1.0]]]])
    assert held.scores(q, pages(8, 2)).flatten().tolist() == [1, 2, 0, 0]
    chosen, _ = Selection(Bounds(2), 4).choose(held, q, np.array([[8]]), np.array([8]))
    assert chosen.mask[0, 0, 0].nonzero()[0].tolist() == [1, 3]


def test_oracle_3_pages_of_one_token_are_exact():
    rng = torch.Generator().manual_seed(1)
    keys, q = torch.randn(1, 2, 40, 8, generator=rng), torch.randn(1, 2, 3, 8, generator=rng)
    keys = keys.bfloat16().float()  # of which 16 bits hold all
    products = torch.einsum("bhgd,bhtd->bhgt", q, keys)
    assert_close(bounds(keys, 1).scores(q, pages(40, 1, 1, 2)), products)
    chosen, _ = Selection(Bounds(1), 9).choose(bounds(keys, 1), q, np.full((1, 2), 40), np.array([40]))
    for head, query in np.ndindex(2, 3):
        best = products[0, head, query, :39].topk(8).indices.tolist()
        assert chosen.mask[0, head, query].nonzero()[0].tolist() == sorted([*best, 39])


@pytest.mark.parametrize("method", [Quest(64), Quest(1.0), Quest(60, page=4)], ids=str)
def test_oracle_4_a_budget_of_all_there_is_is_full_attention(method):
    prompt, said = tokens(40, 23), forced(2, 12)
    dense = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), said)
    got = follow(subject("llama"), kvfold.Cache(subject("llama"), method), *prompt.values(), said)
    assert_close(got, dense, atol=1e-4, rtol=0)


def test_oracle_4_the_first_two_layers_read_everything():
    cache, prompt = kvfold.Cache(subject("llama"), Quest(16)), tokens(60, 60)
    feed(subject("llama"), cache, *prompt.values())
    assert [isinstance(core.stored.segments[0][0], Indexed) for core in cache.paged] == [False, False, True]
    full = kvfold.Cache(subject("llama"), Quest(16, dense=3))
    feed(subject("llama"), full, *prompt.values())
    assert not any(isinstance(core.stored.segments[0][0], Indexed) for core in full.paged)
    mask = grow(prompt["attention_mask"])
    one, two = (feed(subject("llama"), each, forced(2, 1), mask) for each in (cache, full))
    assert not torch.allclose(one, two, atol=1e-3)  # a sixteenth of it is not all


def test_oracle_5_one_by_one_is_all_at_once():
    rng = torch.Generator().manual_seed(2)
    keys = torch.randn(2, 2, 45, 8, generator=rng)
    whole, grown = bounds(keys, 8), bounds(keys[:, :, :0], 8)
    for t in range(45):
        grown.extend(of(keys[:, :, t : t + 1]), np.full((2, 2), t))
    assert torch.equal(grown.held[:, :, :6], whole.held[:, :, :6]) and bool(grown.held[:, :, 6:].isinf().all())


def test_a_page_without_a_token_is_never_read():
    """Rows of other lengths: what is not there is worth nothing, whatever the query."""
    held = Bounds(4).open(Spec(2, 1, 8, 8, torch.float32, torch.device("cpu")))
    valid = torch.ones(2, 1, 20, dtype=torch.bool)
    valid[0, :, :13] = False
    held.extend(of(torch.randn(2, 1, 20, 8), valid), np.zeros((2, 1), dtype=np.int64))
    units = np.array([[2], [5]])
    scores = held.scores(-100 * torch.ones(2, 1, 1, 8), units)
    assert scores[0, ..., 2:].eq(-torch.inf).all() and scores[1].isfinite().all()
    chosen, _ = Selection(Bounds(4), 12).choose(held, torch.ones(2, 1, 1, 8), np.array([[7], [20]]), np.array([7, 20]))
    assert chosen.counts.tolist() == [[[2]], [[3]]]


@pytest.mark.parametrize("group", ["each", "sum", "max"])
def test_query_heads_have_pages_of_their_own_or_share_them(group):
    rng = torch.Generator().manual_seed(3)
    keys, q = torch.randn(1, 1, 64, 8, generator=rng), torch.randn(1, 1, 4, 8, generator=rng)
    held = bounds(keys, 8)
    scores = held.scores(q, pages(64, 8))[0, 0]
    chosen, _ = Selection(Bounds(8), 24, Vote(group)).choose(held, q, np.array([[64]]), np.array([64]))
    worth = {"each": scores, "sum": scores.sum(0, keepdim=True), "max": scores.amax(0, keepdim=True)}[group]
    for row, own in zip(chosen.mask[0, 0], worth, strict=True):
        assert row.nonzero()[0].tolist() == sorted([*own[:7].topk(2).indices.tolist(), 7])


def test_a_generated_token_reads_the_pages_by_definition():
    """In a cache's segment, and in numbers that softmax over those tokens gives."""
    rng = torch.Generator().manual_seed(4)
    form = Indexed(Dense(), Selection(Bounds(16), 48))
    keys, values = torch.randn(1, 1, 100, 8, generator=rng), torch.randn(1, 1, 100, 8, generator=rng)
    places = torch.arange(100, dtype=torch.int32)[None, None]
    segment = form.open(Spec(1, 1, 8, 8, torch.float32, torch.device("cpu")))
    segment.append(
        Chunk(keys[:, :, :99], values[:, :, :99], torch.ones(1, 1, 99, dtype=torch.bool), {POSITION: places[..., :99]})
    )
    q = torch.randn(1, 1, 2, 1, 8, generator=rng)
    out, lse, _ = segment.step(q, keys[:, :, 99:], values[:, :, 99:], torch.tensor([[99]]), 0.5, weights=False)
    for g in range(2):
        product = q[0, 0, g, 0] * keys[0, 0]
        bound = torch.stack(
            [
                torch.maximum(q[0, 0, g, 0] * page.amin(0), q[0, 0, g, 0] * page.amax(0)).sum()
                for page in keys[0, 0].split(16)
            ]
        )
        read = sorted([*bound[:6].topk(2).indices.tolist(), 6])
        logits = product.sum(-1) * 0.5
        seen = torch.zeros(100, dtype=torch.bool)
        for page in read:
            seen[16 * page : 16 * page + 16] = True
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        assert_close(out[0, 0, g, 0], weights @ values[0, 0])
        assert_close(lse[0, 0, g, 0], logits[seen].logsumexp(-1))
