"""What a first cache leaves on a model: it goes with the model, into copies and pickles, and keeps none alive."""

import copy
import io
import weakref

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvfold
from kvfold.hf.argument import cache_in
from kvfold.hf.call.generating import Comparing
from kvfold.hf.call.preparing import Preparing
from models import COMMON, build, tokens, without_collection

OPTIONS = dict(max_new_tokens=6, do_sample=False)


def fresh(name: str = "llama") -> torch.nn.Module:
    """A model that no other test has."""
    return copy.deepcopy(build(name))


def other_text(model: torch.nn.Module, **options) -> None:
    """`generate` with another text on a cache that has read one."""
    cache = kvfold.Cache(model, "full")
    model.generate(**tokens(20), past_key_values=cache, **OPTIONS, **options)
    with pytest.raises(ValueError, match="the cache has read"):
        model.generate(**tokens(40, seed=7), past_key_values=cache, **OPTIONS, **options)


def test_a_model_goes_with_its_last_name():
    model = LlamaForCausalLM(LlamaConfig(**COMMON)).eval()
    cache = kvfold.Cache(model, "h2o", budget=8)
    model.generate(**tokens(20), past_key_values=cache, **OPTIONS)
    left = weakref.ref(model)
    del cache
    with without_collection():
        del model
        assert left() is None


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_asks_as_its_model_does(way):
    model = fresh()
    other_text(model)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    for kind in (Comparing, Preparing):
        standing = vars(copied)[kind.name]
        assert type(standing) is kind and standing.module is copied
    other_text(copied)
    assert torch.equal(copied.generate(**tokens(20), **OPTIONS), model.generate(**tokens(20), **OPTIONS))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_rows_that_were_multiplied_are_compared_too(options):
    other_text(fresh(), **options)


def test_a_cache_of_none_beside_the_other_name():
    cache = object()
    assert cache_in({"cache": None, "past_key_values": cache}) is cache
    assert cache_in({"cache": cache, "past_key_values": None}) is cache
    assert cache_in({}) is None


def report(model: torch.nn.Module) -> bool:
    """A function of a script, which asks for the name of a model's attention."""
    return model.config._attn_implementation == "sdpa"


class Mine(LlamaForCausalLM):
    """A model of one's own in that script."""


def test_a_script_that_asks_for_the_attention_is_no_model():
    model = Mine(LlamaConfig(**COMMON)).eval()
    assert report(model)
    kvfold.Cache(model, "full")
