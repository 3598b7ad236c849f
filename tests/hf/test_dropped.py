"""Models that drop the cache that `generate` gives them, or never read with it."""

import copy
import inspect

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PhimoeConfig, PhimoeForCausalLM

import kvfold
from kvfold.hf.argument import cache_in, name_of, with_cache
from models import COMMON, build, dynamic, tokens

SWITCH = 64
"""Tokens after which the long table of rotations holds."""
ROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8, factor=8.0,
    original_max_position_embeddings=SWITCH,
)  # fmt: skip


def long(kind: str = "phi3"):
    torch.manual_seed(0)
    if kind == "phi3":
        model = Phi3ForCausalLM(Phi3Config(**COMMON, rope_parameters=ROPE, original_max_position_embeddings=SWITCH))
    else:
        rope = ROPE | {"short_mscale": 1.0, "long_mscale": 1.2}
        config = PhimoeConfig(**COMMON, num_local_experts=2, num_experts_per_tok=1, rope_parameters=rope)
        config.original_max_position_embeddings = SWITCH
        model = PhimoeForCausalLM(config)
    return model.eval()


def answer(model, cache, prompt, new=24, **options):
    options = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True) | options
    return model.generate(**prompt, **options, **with_cache(model, cache))


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
@pytest.mark.parametrize("lengths", [(100,), (50,), (50, 31), (SWITCH,), (SWITCH - 1,)], ids=str)
def test_phi3_reads_with_the_cache_that_it_is_given(kind, lengths):
    """Before the switch, behind it, and on it: the whole text is read anew, by the cache that was given."""
    model, prompt = long(kind), tokens(*lengths)
    expected = answer(copy.deepcopy(model), dynamic(model), prompt)
    cache = kvfold.Cache(model)
    got = answer(model, cache, prompt)
    assert torch.equal(got.sequences, expected.sequences)
    assert got.past_key_values is cache and cache.get_seq_length() == max(lengths) + 24 - 1


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}], ids=str)
def test_beams_over_the_switch(options):
    model, prompt = long(), tokens(50, 31)
    expected = answer(copy.deepcopy(model), dynamic(model), prompt, **options)
    assert torch.equal(answer(model, kvfold.Cache(model), prompt, **options).sequences, expected.sequences)


def test_phi3_is_compressed_on_both_sides_of_the_switch():
    model, prompt = long(), tokens(50)
    cache = kvfold.Cache(model, "h2o", budget=16)
    answer(model, cache, prompt)
    assert cache.get_seq_length() == 50 + 23 and {len(x) for row in cache.kept(0) for x in row} == {16}


def test_turns_over_the_switch():
    model, first = long(), tokens(50)
    cache = kvfold.Cache(model)
    said = answer(model, cache, first, new=8).sequences
    more = torch.cat([said, tokens(20, seed=5)["input_ids"]], 1)
    prompt = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    expected = answer(copy.deepcopy(model), dynamic(model), prompt)
    got = answer(model, cache, prompt)
    assert torch.equal(got.sequences, expected.sequences) and cache.get_seq_length() == 78 + 23


def test_a_mode_stays_when_the_text_is_read_anew():
    model, prompt = long(), tokens(50)
    cache = kvfold.Cache(model, "h2o", budget=16)
    with cache.undecided():
        answer(model, cache, prompt)
    assert cache.kept_tokens == 50 + 23


def test_rows_with_several_methods_are_not_lost():
    model = long()
    one, other = kvfold.Cache(model, "h2o", budget=16), kvfold.Cache(model)
    for cache in (one, other):
        answer(model, cache, tokens(50), new=4)
    one.join(other)
    ids = torch.randint(3, 97, (2, SWITCH + 1))
    with pytest.raises(RuntimeError, match=r"Phi3ForCausalLM drops .* after 53 tokens and reads its text again"):
        answer(model, one, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert one.get_seq_length() == 53


# -- others --------------------------------------------------------------------------------------------------


class DroppingForCausalLM(LlamaForCausalLM):
    """Loses its cache, but reads only the last token."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        made = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if input_ids.shape[1] > 12:
            made.pop(name_of(type(self).forward))
        return made


def test_a_cache_that_is_dropped_and_not_read_anew_is_an_error():
    model = DroppingForCausalLM(LlamaConfig(**COMMON)).eval()
    with pytest.raises(RuntimeError, match=r"DroppingForCausalLM drops the cache .* after 12 tokens, and does not"):
        answer(model, kvfold.Cache(model), tokens(9))


@torch.no_grad()
def test_a_cache_that_nobody_reads_with_is_an_error():
    model = build("llama")
    body, forward = model.model, type(model.model).forward
    cache = kvfold.Cache(model)
    body.forward = lambda *args, **kwargs: forward(
        body, *args, **{**kwargs, name_of(forward): dynamic(model) if cache_in(kwargs) is cache else cache_in(kwargs)}
    )
    with pytest.raises(RuntimeError, match="LlamaForCausalLM was given a kvfold cache and has not read with it"):
        model(**tokens(9), **with_cache(model, cache))
    model(**tokens(9), **with_cache(model, dynamic(model)))
    model(**tokens(9))


@torch.no_grad()
def test_a_model_that_gives_back_another_cache_is_an_error():
    model = build("llama")
    forward, name = type(model).forward, name_of(type(model).forward)

    def other(*args, **kwargs):
        out = forward(model, *args, **kwargs)
        out[name] = dynamic(model)
        return out

    cache = kvfold.Cache(model)
    model.forward = other
    with pytest.raises(RuntimeError, match="LlamaForCausalLM was given a kvfold cache and gives back a DynamicCache"):
        model(**tokens(9), **with_cache(model, cache))


def test_generate_hears_of_the_models_own_arguments():
    model = long()
    before = inspect.signature(model.prepare_inputs_for_generation)
    kvfold.Cache(model)
    assert inspect.signature(model.prepare_inputs_for_generation) == before
    twin = copy.deepcopy(model)
    assert twin.prepare_inputs_for_generation.module is twin
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**tokens(5), nonsense=1)
