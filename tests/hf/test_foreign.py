"""A cache given to another model than its own: the keys in it mean nothing there."""

import copy

import pytest
import torch

import kvfold
from models import build, feed, grow, pictured, subject, tokens

ids, mask = tokens(20).values()


def read(model, method="h2o(budget=8)"):
    """A cache that has read a prompt."""
    cache = kvfold.Cache(model, method)
    feed(model, cache, ids, mask)
    return cache


def refused(call, cache, how=ValueError, message="made for another LlamaForCausalLM than the Llama"):
    """The call fails, and the cache is as it was."""
    before = cache.get_seq_length(), cache.kept(0)
    with pytest.raises(how, match=message), torch.no_grad():
        call()
    assert (cache.get_seq_length(), cache.kept(0)) == before


@pytest.mark.parametrize("used", [True, False], ids=["used", "empty"])
@pytest.mark.parametrize("name", ["llama", "llama-one-layer"])
@pytest.mark.parametrize("part", ["model", "body"])
def test_another_model_of_the_same_shape(name, used, part):
    own, other = build(name), build(name, seed=1)
    cache = read(own) if used else kvfold.Cache(own)
    kvfold.Cache(other)
    called = other if part == "model" else other.model
    refused(lambda: called(ids[:, :1], past_key_values=cache), cache)
    refused(lambda: called(ids[:, :3], past_key_values=cache), cache)
    feed(own, cache, ids[:, :1], grow(mask) if used else mask[:, :1])  # it goes on where it belongs


def test_generate_with_it():
    own, other = build("llama"), build("llama", seed=1)
    cache = kvfold.Cache(own)
    kvfold.Cache(other)
    refused(lambda: other.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2), cache)


def test_a_copy_is_another_model():
    own = build("llama")
    cache = read(own)
    refused(lambda: copy.deepcopy(own)(ids[:, :1], past_key_values=cache), cache)


def test_a_model_that_kvfold_has_never_seen():
    cache = read(build("llama"))
    message = "is part of another model than the one that the cache was made for"
    refused(lambda: build("llama", seed=1)(ids[:, :1], past_key_values=cache), cache, RuntimeError, message)


def test_two_models_in_turns():
    """Each with its own cache; one error leaves nothing behind."""
    one, two = build("llama"), build("llama", seed=1)
    a, b = read(one), read(two)
    refused(lambda: two(ids[:, :1], past_key_values=a), a)
    got = [feed(model, cache, ids[:, :1], grow(mask)) for model, cache in ((two, b), (one, a))]
    want = [feed(model, read(model), ids[:, :1], grow(mask)) for model in (two, one)]
    assert all(map(torch.equal, got, want))


def test_the_parts_of_a_model_share_its_cache():
    """A body under its head, and a head over a body that the cache was made for."""
    model = build("llama")
    want = feed(model, kvfold.Cache(model), ids, mask)
    with torch.no_grad():
        for owner, called in ((model, model.model), (model.model, model), (model.model, model.model)):
            out = called(ids, past_key_values=kvfold.Cache(owner))
            got = out.logits if called is model else model.lm_head(out.last_hidden_state)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_the_text_decoder_of_a_model_with_images():
    model, given = subject("llava"), pictured("llava", (9,))
    with torch.no_grad():
        want = model(**given, past_key_values=kvfold.Cache(model)).logits
        out = model.model(**given, past_key_values=kvfold.Cache(model))
        text = model.model.language_model(given["input_ids"], past_key_values=kvfold.Cache(model))
    for states in (out, text):
        torch.testing.assert_close(model.lm_head(states.last_hidden_state), want, atol=2e-5, rtol=0)
