"""decoding(...): an interval of generated tokens is, to the method inside, what a further turn of a prompt is."""

import pytest
import torch

import kvfold
from kvfold.methods._intervals import left_for
from kvfold.methods.kvfold import KVFold
from models import subject, tokens
from saying import kept, read, say

INNER = [
    "adakv", "cam", "chelsea", "ems", "expected-attention", "h2o", "keepkv", "keyformer", "kvcrush", "kvmerger",
    "lacache", "pyramidkv", "scissorhands", "snapkv", "streamingllm", "tova", "windowkv",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("slug", INNER)
def test_an_interval_is_a_turn(slug, name):
    """One token at a time under decoding(...): the tokens and answers of a method that reads turns of an interval."""
    model, period, budget = subject(name), 5, 20
    steps = tokens(33, 33)["input_ids"]
    prompt = tokens(40, 40)["input_ids"]
    cache = kvfold.Cache(model, f"decoding({slug}, budget={budget}, interval={period})")
    turns = kvfold.Cache(model, slug, budget=left_for(budget, period))
    read(model, cache, prompt)
    read(model, turns, prompt)
    for start in range(0, 30, period):
        one = say(model, cache, steps[:, start : start + period])
        with turns.prefilling():
            whole = read(model, turns, steps[:, start : start + period])
        torch.testing.assert_close(one, whole, atol=2e-4, rtol=0)
        assert kept(cache) == kept(turns), f"after {start + period} tokens"


def test_folding_at_an_interval_is_folding_a_turn():
    """kvfold, all of whose layers act after the same token, against turns."""
    model, steps, prompt = subject("llama"), tokens(24, 24)["input_ids"], tokens(40, 40)["input_ids"]
    together = type("Together", (KVFold,), {"staggered": False})
    cache = kvfold.Cache(model, together(budget=17, interval=6, refit=0))
    turns = kvfold.Cache(model, KVFold(budget=12, interval=0, refit=0))
    read(model, cache, prompt)
    read(model, turns, prompt)
    for start in range(0, 24, 6):
        one = say(model, cache, steps[:, start : start + 6])
        with turns.prefilling():
            whole = read(model, turns, steps[:, start : start + 6])
        torch.testing.assert_close(one, whole, atol=2e-4, rtol=0)
        assert kept(cache) == kept(turns)
        assert sum(core.counts() for core in cache.paged).sum(1).tolist() == [12 * 2 * len(cache.paged)] * 2
