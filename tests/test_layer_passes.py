"""A layer's passes apart from any model: new tokens that see each other all, copies that take no block's mode along."""

import pytest
import torch

import kvfold
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.full import Full
from models import feed, grow, subject, tokens


@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)], ids=["even", "padded"])
def test_a_block_sees_itself_and_all_that_is_stored(lengths):
    generator = torch.Generator().manual_seed(0)
    layer = KVLayer(Rows(Full()), 0)
    q, k, v = (torch.randn(2, heads, 15, 8, generator=generator) for heads in (4, 2, 2))
    first, block = slice(0, 6), slice(6, 15)
    layer.attend(q[:, :, first], k[:, :, first], v[:, :, first], None, 0.3, Plan(prefill=True))
    valid = torch.arange(9) >= torch.tensor([[9 - n] for n in lengths])
    out = layer.attend(q[:, :, block], k[:, :, block], v[:, :, block], valid, 0.3, Plan(prefill=True, block=True))
    for row, length in enumerate(lengths):
        seen = [*range(6), *range(15 - length, 15)]
        for head in range(4):
            weights = (q[row, head, 15 - length :] @ k[row, head // 2, seen].T * 0.3).softmax(-1)
            torch.testing.assert_close(out[row, head, 9 - length :], weights @ v[row, head // 2, seen])
    assert layer.counts().tolist() == [[6 + n] * 2 for n in lengths]


@pytest.mark.parametrize("block", ["undecided", "prefilling", "observed", "tentative"])
def test_a_fork_made_within_a_block_is_free_of_it(block):
    """It held 37 tokens under a budget of 32, for ever."""
    model, prompt = subject("llama"), tokens(40, 30)
    cache, seen = kvfold.Cache(model, "h2o(budget=16)"), []
    feed(model, cache, *prompt.values())
    given = (seen.append,) if block == "observed" else ()
    with getattr(cache, block)(*given):
        fork = cache.fork()
    mask = grow(prompt["attention_mask"])
    for each in (cache, fork):
        feed(model, each, torch.tensor([[5], [7]]), mask)
        assert each.paged[0].counts().tolist() == [[16, 16]] * 2
    assert fork.kept(1) == cache.kept(1) and not seen and fork.mode == cache.mode


@pytest.mark.parametrize("block", ["undecided", "prefilling", "tentative", "observed"])
def test_a_block_that_fails_is_over(block):
    cache = kvfold.Cache(subject("llama"), "h2o(budget=16)")
    before = cache.mode
    with pytest.raises(ZeroDivisionError), getattr(cache, block)(*[print] * (block == "observed")):
        assert cache.mode != before
        raise ZeroDivisionError
    assert cache.mode == before


def test_a_token_after_passes_without_a_trace_stands_where_it_would_have():
    model, prompt = subject("llama"), tokens(20, 13)
    cache, mask = kvfold.Cache(model, "full"), grow(prompt["attention_mask"])
    feed(model, cache, *prompt.values())
    feed(model, cache, torch.tensor([[5], [7]]), mask)
    with cache.tentative():
        feed(model, cache, torch.tensor([[6], [8]]), grow(mask))
        feed(model, cache, torch.tensor([[6], [8]]), grow(mask, 2))
    feed(model, cache, torch.tensor([[9], [9]]), grow(mask))
    assert cache.kept(1) == [[list(range(22))] * 2, [list(range(15))] * 2]


def test_a_captured_step_counts_as_one_that_ran():
    rows, captured = Rows(Full()), Rows(Full())
    device, valid = torch.device("cpu"), torch.arange(6) >= torch.tensor([[0], [2]])
    for each in (rows, captured):
        each.begin(Plan(prefill=True), 2, 6, valid, device)
    for _ in range(3):
        rows.begin(Plan(prefill=False), 2, 1, None, device)
        captured.clock(device).add_(1)  # what the graph does on the device
        captured.replayed()
    for each in (rows, captured):
        assert (each.seen.tolist(), each.prompt.tolist(), each.clock(device).tolist()) == ([9, 7], [6, 4], [[9], [7]])
        assert (each.width, each.width_before, each.number) == (9, 8, 4)
