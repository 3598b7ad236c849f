"""Models that take their cache as `cache`, as transformers 5.24 names it, and those that take `past_key_values`."""

import warnings
from inspect import signature

import pytest
import torch
from transformers import LlamaForCausalLM

import kvfold
from kvfold.evaluation.decoding import decode, prefill, teacher_forced
from kvfold.hf.argument import cache_in, name_of, with_cache
from models import subject, tokens


class RenamedLlama(LlamaForCausalLM):
    """A Llama with the new name alone; the old one is heard, and warned of."""

    def forward(self, input_ids=None, cache=None, **kwargs):
        if "past_key_values" in kwargs:
            warnings.warn("`past_key_values` is deprecated", FutureWarning, stacklevel=2)
        given = kwargs.pop("past_key_values", cache)
        return super().forward(input_ids, **{name_of(LlamaForCausalLM.forward): given}, **kwargs)


@pytest.fixture(scope="module")
def renamed():
    model = RenamedLlama(subject("llama").config).eval()
    model.load_state_dict(subject("llama").state_dict())
    return model


def test_the_name_is_asked_of_the_model(renamed):
    cache = object()
    mine = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    assert with_cache(renamed, cache) == {"cache": cache} and with_cache(subject("llama"), cache) == {mine: cache}
    assert cache_in({"cache": cache}) is cache_in({"past_key_values": cache}) is cache and cache_in({}) is None


@torch.no_grad()
@pytest.mark.parametrize("method", ["full", "kvfold", "kvzip", "speckv", "streamingllm", "specpc", "fastkv"])
def test_both_names_are_heard_and_the_new_one_is_used(renamed, method):
    """Warnings are errors here, so none of kvfold's own calls uses the old name."""
    ids = tokens(60)["input_ids"]
    said = []
    for model in (subject("llama"), renamed):
        cache = kvfold.Cache(model, method)
        read = prefill(model, ids, cache)
        kept, logits = cache.kept(2), teacher_forced(model, cache.fork(), read.logits, [5, 6, 7])
        said.append((logits, kept, decode(model, cache, read.logits, 4).tokens))
    torch.testing.assert_close(said[0][0], said[1][0])
    assert said[0][1:] == said[1][1:]
    cache = kvfold.Cache(renamed, method)
    with pytest.warns(FutureWarning):
        renamed(ids, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1] and cache.kept(2) == said[1][1]


def test_generate_gets_a_cache_of_ours_by_the_name_that_it_wants():
    """Whoever says past_key_values hears no warning of it, on any release."""
    cache = kvfold.Cache(subject("llama"), "snapkv", budget=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.model.generate(**tokens(30), past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert cache.get_seq_length() == 32
