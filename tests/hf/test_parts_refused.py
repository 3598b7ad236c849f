"""Prompts that are not read in parts, because a part would be told something else than the whole."""

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, RobertaConfig, RobertaForCausalLM

import kvfold
from kvfold.hf.call.splitting import can_cut, part_for, reads_in_parts
from models import VOCAB, build, feed, grow, tokens

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
BY_PLACE = {
    "bert": lambda: BertLMHeadModel(BertConfig(**SIZES, is_decoder=True, pad_token_id=0)),
    "roberta": lambda: RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True, pad_token_id=0)),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_padding_counts_in_layers_that_get_their_mask_by_place(name):
    torch.manual_seed(0)
    model = BY_PLACE[name]().eval()
    ids, mask = tokens(40, 23).values()
    turn = tokens(19, 19, seed=5)["input_ids"]
    said = []
    for size in (0, 7):
        cache = kvfold.Cache(model, "full", part_size=size)
        said.append([feed(model, cache, ids, mask)[:, -1], feed(model, cache, turn, grow(mask, 19))[:, -1]])
    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=0)


def test_a_mask_that_looks_ahead_is_not_cut():
    causal = torch.ones(1, 1, 6, 9, dtype=torch.bool).tril(3)
    ahead = causal.clone()
    ahead[..., 2, 7] = True  # the third token sees the fifth, as in an image
    least = torch.finfo(torch.float32).min
    for mask, fits in ((causal, True), (ahead, False)):
        assert can_cut("attention_mask", mask, 6) is fits
        added = torch.zeros(mask.shape).masked_fill(~mask, least)
        assert can_cut("attention_mask", added, 6) is fits


def test_a_hook_inside_a_layer_that_comes_later_is_asked_about():
    model = build("llama")
    ids, mask = tokens(40).values()
    assert reads_in_parts(kvfold.Cache(model, part_size=7))

    def steer(module, args, output):
        output[:, -1] += 3.0  # of a part, each time

    whole, parts = (kvfold.Cache(model, part_size=size) for size in (0, 7))
    hook = model.model.layers[1].mlp.register_forward_hook(steer)
    with torch.no_grad():
        torch.testing.assert_close(feed(model, parts, ids, mask), feed(model, whole, ids, mask), atol=1e-4, rtol=0)
    assert not reads_in_parts(parts)
    hook.remove()
    assert reads_in_parts(parts)


def test_the_next_call_of_a_body_is_asked_anew():
    model = build("llama")
    cache = kvfold.Cache(model, part_size=7)
    with torch.no_grad():
        model.model(input_ids=tokens(20)["input_ids"], past_key_values=cache)
        assert cache.call.part == 7
        model.model(input_ids=tokens(5)["input_ids"], past_key_values=cache)
    assert cache.call.part == 0


def test_an_argument_that_is_none_leaves_the_configuration_its_say():
    model = build("llama")
    cache = kvfold.Cache(model, part_size=7)
    assert part_for(cache, 20, {"output_router_logits": None}) == 7
    model.config.output_router_logits = True
    assert part_for(cache, 20, {"output_router_logits": None}) == 0
    assert part_for(cache, 20, {"output_router_logits": False}) == 7


@pytest.mark.parametrize("lengths", [(40,), (40, 23)])
def test_windows_keep_to_their_band_in_layers_that_are_compiled_one_by_one(lengths):
    plain, model = build("gemma3"), build("gemma3")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    ids, mask = tokens(*lengths).values()
    said = []
    for each in (plain, model):
        cache = kvfold.Cache(each, "full")
        step = torch.full((len(lengths), 1), 5)
        with torch.no_grad():
            said.append([feed(each, cache, ids, mask)[:, -1], feed(each, cache, step, grow(mask, 1))[:, -1]])
    torch.testing.assert_close(said[1], said[0], atol=1e-4, rtol=0)
