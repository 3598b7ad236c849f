"""Budgets from both sides: a prompt in one forward uses all that it is allowed, one in chunks never more."""

import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfold
from families import FREE, LIMITED, each
from kvfold.budgets import allocate
from kvfold.budgets.allocate import exempt_layers
from kvfold.methods._intervals import left_for
from models import feed, subject, tokens

BUDGETS = st.one_of(st.floats(0.02, 1.0), st.integers(1, 70))


def allowed(method, cache, budget, length: int) -> int:
    """What a row of `length` tokens may hold, summed over heads and layers, by the method's own rule."""
    budget = left_for(budget, method.period)  # the next tokens have room until they are cut
    layers, heads = len(cache.paged), cache.paged[0].shape[0]
    if budget == 1.0 and isinstance(budget, float):
        return length * layers * heads
    if method.info.slug == "compresskv":  # a layer's heads keep the same tokens: whole tokens for all of them
        return int((budget * length if isinstance(budget, float) else min(budget, length)) + 1e-9) * layers * heads
    weights = None
    if method.info.slug == "kvmerger":  # its first two and its last layer are kept as far as the others can pay
        share = budget if isinstance(budget, float) else min(1.0, budget / length)
        weights = exempt_layers(cache.paged[0].site.paged[:2] + cache.paged[0].site.paged[-1:], layers, share)
    shares = allocate(budget, length, length, layers, heads, weights)
    if method.info.slug in ("tova", "elastic-cache-vlm"):  # a layer's heads keep the same tokens: the smallest share
        return sum(min(row) * heads for row in shares)
    return sum(map(sum, shares))


def held(cache, row: int) -> int:
    return sum(int(core.counts()[row].sum()) for core in cache.paged)


def allowance(cache, budget, length: int) -> int:
    """The bound for every method: the budget of all heads and layers together, rounded down."""
    each = budget * length if isinstance(budget, float) else min(budget, length)
    return int(each * len(cache.paged) * cache.paged[0].shape[0] + 1e-6)


@each(LIMITED, name=["llama", "gemma3"])
@given(budget=BUDGETS, lengths=st.lists(st.integers(1, 80), min_size=1, max_size=2))
def test_the_budget_is_used_up(slug, name, budget, lengths):
    """Also where it is hard: rows shorter than windows, budgets under one token per head."""
    model, cache = subject(name), kvfold.Cache(subject(name), slug, budget=budget)
    feed(model, cache, *tokens(*lengths).values())
    for row, length in enumerate(lengths):
        assert held(cache, row) == allowed(cache.method, cache, budget, length) <= allowance(cache, budget, length)


@each(LIMITED, cases=4, budget=[0.5, 0.1, 9, 1.0], chunk=[1, 16, 8, 3])
def test_a_prompt_in_chunks(slug, budget, chunk):
    """Single tokens, and a last chunk of one: still a prompt, within its budget after every chunk, never empty."""
    lengths = {1: (19, 15), 16: (33, 33), 8: (41, 30), 3: (37, 2)}[chunk]
    prompt = tokens(*lengths)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    assert ids.shape[1] % chunk in (0, 1)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), slug, budget=budget)
    with cache.prefilling():
        for stop in range(chunk, ids.shape[1] + chunk, chunk):
            logits = feed(model, cache, ids[:, stop - chunk : stop], mask[:, :stop])
            for row, seen in enumerate(mask[:, :stop].sum(1).tolist()):
                assert held(cache, row) <= allowance(cache, budget, seen)
                assert all(core.prompt[row] == seen for core in cache.paged)
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        assert held(cache, row) > 0 or not allowed(cache.method, cache, budget, length)
        if budget != 0.1 and slug not in {*FREE, "kvmerger"}:  # kvmerger merges; 0.1 is all sinks
            assert all(head[-1] == length - 1 for head in cache.kept(2)[row])
        if budget == 1.0:
            assert held(cache, row) == length * 6


@each(LIMITED)
def test_chunks_of_a_whole_budget_are_the_prompt(slug):
    """Nothing is dropped, so the chunks must be told apart by nothing: kept sets and logits of one forward."""
    prompt = tokens(33, 25)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, chunked = subject("llama"), kvfold.Cache(subject("llama"), slug, budget=1.0)
    with chunked.prefilling():
        parts = [feed(model, chunked, ids[:, i : i + 8], mask[:, : i + 8]) for i in range(0, 33, 8)]
    whole = kvfold.Cache(model, slug, budget=1.0)
    expected = feed(model, whole, ids, mask)
    assert chunked.kept(2) == whole.kept(2)
    for row in range(2):
        valid = mask[row].bool()
        torch.testing.assert_close(torch.cat(parts, 1)[row][valid], expected[row][valid], atol=1e-4, rtol=0)
