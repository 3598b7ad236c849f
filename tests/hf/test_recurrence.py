"""Recurrent states behind which several tokens are read: carried on exactly, or refused before anything is read."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

import kvfold
from kvfold.hf.recurrence import carries_state
from models import COMMON, build, subject, tokens

MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16)
MOE = dict(num_local_experts=2, num_experts_per_tok=1)
HYBRIDS = {
    "bamba": dict(attn_layer_indices=[1], **MAMBA2),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=64, mamba_expand=2, **MAMBA2, **MOE
    ),
    "olmo_hybrid": dict(
        layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
    "qwen3-next": {},
}  # fmt: skip
FORGETFUL = {
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8,
                  mamba_dt_rank=8),
    "zamba": dict(num_hidden_layers=8, attn_layer_period=6, attn_layer_offset=4, n_mamba_heads=2,
                  attention_head_dim=32, attention_hidden_size=128, mamba_d_state=8),
}  # fmt: skip
RECURRENT_GEMMA = dict(block_types=["recurrent", "attention"], lru_width=64, attention_window_size=8, head_dim=16)


def make(name):
    if name == "qwen3-next":
        return subject(name)
    options = {**HYBRIDS, **FORGETFUL, "recurrent_gemma": RECURRENT_GEMMA}[name]
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**COMMON, **options})).eval()


@torch.no_grad()
def read(model, cache, cuts, masked=False):
    """Logits of a text that is read in pieces of these lengths, without positions."""
    ids, found, at = tokens(sum(cuts))["input_ids"], [], 0
    for count in cuts:
        mask = {"attention_mask": torch.ones(1, at + count, dtype=torch.long)} if masked else {}
        found.append(model(ids[:, at : at + count], past_key_values=cache, **mask).logits)
        at += count
    return torch.cat(found, 1)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", list(HYBRIDS))
def test_pieces_give_what_one_pass_gives(name, masked):
    model = make(name)
    whole = read(model, kvfold.Cache(model, "full"), [36], masked)
    for cuts in ([16, 16, 4], [20] + [1] * 16, [30, 1, 5]):
        torch.testing.assert_close(
            read(model, kvfold.Cache(model, "full"), cuts, masked), whole, rtol=1e-3, atol=1e-3 * whole.abs().max()
        )
    chunked = kvfold.Cache(model, "full", prefill_chunk=16)
    torch.testing.assert_close(read(model, chunked, [36], masked), whole, rtol=1e-3, atol=1e-3 * whole.abs().max())


@pytest.mark.filterwarnings("ignore:ZambaForCausalLM has no layer with full attention")
@pytest.mark.parametrize("name", list(FORGETFUL))
def test_forgotten_states_are_refused(name):
    model = make(name)
    with pytest.raises(ValueError, match="forgets its recurrent states"):
        kvfold.Cache(model, "full", prefill_chunk=16)
    cache, other = kvfold.Cache(model, "full"), kvfold.Cache(model, "full")
    said = read(model, cache, [20, 1, 1, 1])
    torch.testing.assert_close(said, read(model, other, [23]), rtol=1e-3, atol=1e-3)  # token by token it is right
    with pytest.raises(ValueError, match="read its text as one prompt"):
        read(model, cache, [5])
    assert cache.get_seq_length() == 23
    torch.testing.assert_close(read(model, cache, [1]), read(model, other, [1]), rtol=1e-3, atol=1e-3)
    model.generate(tokens(9)["input_ids"], past_key_values=kvfold.Cache(model, "full"), max_new_tokens=3)


def test_states_in_modules_are_refused():
    model = make("recurrent_gemma")
    with pytest.raises(ValueError, match="keeps its recurrent states in its modules"):
        kvfold.Cache(model, "full")
    assert model.config._attn_implementation == "sdpa"


def test_models_without_states_have_nothing_to_forget():
    assert carries_state(build("llama")) and carries_state(make("lfm2"))
