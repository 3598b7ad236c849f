"""Masks that a model makes: those that no layer on pages uses, and those that turn out causal."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4TextConfig,
    NemotronHConfig,
    Qwen2MoeConfig,
)

import kvfold
from models import COMMON, dynamic, feed, greedy, grow, tokens

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
GEMMA = dict(
    head_dim=16, global_head_dim=16, sliding_window=8, hidden_size_per_layer_input=0, vocab_size_per_layer_input=97,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
)  # fmt: skip


def same(model, lengths, steps=8):
    """Greedy answers with `full` are those of transformers' own cache."""
    prompt = tokens(*lengths)
    expected, logits = greedy(model, dynamic(model), *prompt.values(), steps)
    cache = kvfold.Cache(model)
    got, ours = greedy(model, cache, *prompt.values(), steps)
    assert torch.equal(got, expected) and cache.paged
    torch.testing.assert_close(ours, logits, atol=2e-4, rtol=0)


def made(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("window", [4, 4096])
def test_a_window_that_no_layer_has(window):
    """Qwen2-MoE makes a window's mask beside the causal one, and by default no layer takes it."""
    model = made(Qwen2MoeConfig(**COMMON, **EXPERTS, sliding_window=window))
    for lengths in ((23,), (23, 9)):
        same(model, lengths)


def test_gemma4_without_shared_layers():
    model = made(Gemma4TextConfig(**COMMON, **GEMMA, num_kv_shared_layers=0))
    same(model, (23, 9))
    with pytest.raises(ValueError, match="Gemma4ForCausalLM shares keys and values between layers"):
        kvfold.Cache(made(Gemma4TextConfig(**{**COMMON, "num_hidden_layers": 3}, **GEMMA, num_kv_shared_layers=1)))


def test_layers_without_attention():
    """Nemotron-H has layers that are an MLP alone: the cache has a layer for each that holds nothing."""
    kinds = ["mamba", "attention", "mlp", "attention"]
    config = NemotronHConfig(
        **{**COMMON, "num_hidden_layers": 4}, layers_block_type=kinds, head_dim=16, mamba_num_heads=8,
        mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=8, expand=2,
    )  # fmt: skip
    same(made(config), (23,))


def gemma3():
    text = {**COMMON, **GEMMA, "query_pre_attn_scalar": 16}
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                  patch_size=4)  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=96,
                          boi_token_index=95, eoi_token_index=94)  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()


@torch.no_grad()
@pytest.mark.parametrize("entries", [1 << 22, 50], ids=["whole", "pieces"])
def test_gemma3_reads_text_with_token_types(entries, monkeypatch):
    """A processor gives `token_type_ids` with every text: without images the mask made of them is causal."""
    monkeypatch.setattr("kvfold.hf.attention.ENTRIES", entries)
    model, prompt = gemma3(), tokens(19, 11)
    types = torch.zeros_like(prompt["input_ids"])
    expected = model(**prompt, token_type_ids=types, past_key_values=dynamic(model))
    cache = kvfold.Cache(model)
    got = model(**prompt, token_type_ids=types, past_key_values=cache)
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=0)
    more, mask = torch.full((2, 1), 7), grow(prompt["attention_mask"])
    torch.testing.assert_close(
        feed(model, cache, more, mask), feed(model, expected.past_key_values, more, mask), atol=2e-4, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("entries", [1 << 22, 50], ids=["whole", "pieces"])
def test_tokens_that_see_each_other_are_refused(entries, monkeypatch):
    monkeypatch.setattr("kvfold.hf.attention.ENTRIES", entries)
    model, prompt = gemma3(), tokens(19)
    types = torch.zeros_like(prompt["input_ids"])
    types[:, 12:16] = 1
    with pytest.raises(ValueError, match="Gemma3Attention asks for an attention mask that is not causal"):
        model(**prompt, token_type_ids=types, past_key_values=kvfold.Cache(model))
