"""Multi-head latent attention (DeepSeek-V2 and -V3, MiniCPM3 ...): latents on pages, answers as without kvfold."""

import copy
import io
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

import kvfold
from kvfold.bench.plan import shape_of
from kvfold.hf.latent import LatentHandle, is_latent
from models import COMMON, dynamic, follow, greedy, tokens

MLA = COMMON | dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12,
    head_dim=8,
)  # fmt: skip
MOE = dict(
    n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    first_k_dense_replace=1,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "deepseek_v3": MLA | MOE,
    "deepseek_v2": MLA | MOE | {"q_lora_rank": None},
    "minicpm3": MLA,
}
FORCED = torch.arange(3, 15)[None].expand(2, -1)


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**KINDS[kind]), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(23,), (23, 9), (40, 40)], ids=str)
def test_full_is_exact(kind, lengths):
    model, prompt = made(kind), tokens(*lengths)
    expected, logits = greedy(model, dynamic(model), *prompt.values(), 12)
    subject = copy.deepcopy(model)
    cache = kvfold.Cache(subject)
    got, ours = greedy(subject, cache, *prompt.values(), 12)
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours, logits, atol=2e-4, rtol=0)
    after, _ = greedy(subject, dynamic(subject), *prompt.values(), 12)
    assert torch.equal(after, expected), "without a kvfold cache nothing may change"


@pytest.mark.parametrize(
    "method",
    [
        "h2o",
        "snapkv",
        "tova",
        "streamingllm",
        "kvmerger",
        "kvfold",
        "adakv",
        "h2o | fp8",
        "kivi(residual=32)",
        "minicache",
        "kvzip",
    ],
)
def test_methods_run(method):
    model, prompt = made("deepseek_v3"), tokens(40, 31)
    text = method if "|" in method else kvfold.parse(method)
    cache = kvfold.Cache(model, text)
    logits = follow(model, cache, *prompt.values(), FORCED)
    assert bool(logits.isfinite().all())
    assert cache.kept_tokens <= 40 + 12


def test_a_budget_of_everything_is_exact_and_a_small_one_keeps_what_it_says():
    model, prompt = made("deepseek_v3"), tokens(40, 31)
    expected = follow(model, dynamic(model), *prompt.values(), FORCED)
    whole = follow(model, kvfold.Cache(model, "h2o", budget=1.0), *prompt.values(), FORCED)
    torch.testing.assert_close(whole, expected, atol=2e-4, rtol=0)
    cache = kvfold.Cache(model, "h2o", budget=16)
    follow(model, cache, *prompt.values(), FORCED)
    assert {len(held) for layer in range(3) for row in cache.kept(layer) for held in row} == {16}


def test_a_share_of_memory_is_one_of_latents():
    """Half of a dense float16 cache of 3,000 tokens, whose layers hold 16 numbers of a latent and 8 of a turned key."""
    model, half = made("deepseek_v3"), 3000 * 3 * (16 + 8) * 2 // 2
    shared = kvfold.Cache(model, "kvfold", memory=0.5, context=3000, quantize=False)
    assert shared.method == kvfold.Cache(model, "kvfold", memory=half).method


def test_bytes_are_those_of_latents():
    model, prompt = made("deepseek_v3"), tokens(64)
    theirs, ours = dynamic(model), kvfold.Cache(model)
    for cache in (theirs, ours):
        greedy(model, cache, *prompt.values(), 1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
    assert ours.dense_nbytes == held == 64 * 3 * (16 + 8) * 4
    assert sum(layer.dense_nbytes for layer in ours.report().layers) == held
    (heads, d, dv), *_ = [core.shape for core in ours.paged]
    assert (heads, d, dv) == (1, 16 + 8, 16)


def test_plan_knows_what_is_held():
    model = made("deepseek_v3")
    cache = kvfold.Cache(model)
    greedy(model, cache, *tokens(9).values(), 1)
    planned = [(layer.heads, layer.key_size, layer.value_size) for layer in shape_of(model).layers]
    assert planned == [core.shape for core in cache.paged]


def test_it_is_forked_saved_and_read_on(tmp_path):
    model, prompt = made("deepseek_v3"), tokens(23, 9)
    first = kvfold.Cache(model, "h2o", budget=16)
    expected = follow(model, first.fork(), *prompt.values(), FORCED)
    logits = follow(model, first, *prompt.values(), FORCED[:, :4])
    torch.testing.assert_close(logits, expected[:, :5])
    first.save(tmp_path / "cache")
    read = kvfold.Cache.load(tmp_path / "cache", model)
    assert read.kept(0) == first.kept(0) and read.dense_nbytes == first.dense_nbytes
    assert first.fork().dense_nbytes == first.dense_nbytes


@pytest.mark.parametrize("chunk", [8, 23])
def test_in_chunks_and_bfloat16(chunk):
    model, prompt = made("deepseek_v3"), tokens(40, 31)
    expected = follow(model, dynamic(model), *prompt.values(), FORCED)
    got = follow(model, kvfold.Cache(model, prefill_chunk=chunk), *prompt.values(), FORCED)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
    half = model.to(torch.bfloat16)
    coarse = follow(half, kvfold.Cache(half, prefill_chunk=chunk), *prompt.values(), FORCED)
    theirs = follow(half, dynamic(half), *prompt.values(), FORCED)
    assert float((coarse - expected).abs().mean()) < 2 * float((theirs - expected).abs().mean())


def test_compact_positions_are_refused():
    with pytest.raises(ValueError, match=r"positions='compact'\) needs RoPE"):
        kvfold.Cache(made("deepseek_v3"), "streamingllm", positions="compact")


def test_a_model_that_had_a_cache_can_be_copied_and_stored():
    model = made("minicpm3")
    kvfold.Cache(model)
    twin = copy.deepcopy(model)
    attention = twin.model.layers[0].self_attn
    assert is_latent(attention) and attention.expand_kv.module is attention
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    prompt = tokens(12)
    assert torch.equal(
        greedy(again, kvfold.Cache(again), *prompt.values(), 6)[0], greedy(twin, dynamic(twin), *prompt.values(), 6)[0]
    )


def test_values_with_a_constant():
    """What `expand_kv` adds to every value, and to every key, whatever the latent."""

    class Biased(torch.nn.Module):
        def expand_kv(self, latent, turned):
            keys = torch.einsum("bxtr,hrd->bhtd", torch.cat([latent, turned], -1), a) + 0.7
            return keys, torch.einsum("bxtr,hrd->bhtd", latent, b) - 1.3

    class Dense:
        def attend(self, module, q, k, v, valid, scale):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    a, b = torch.randn(4, 12, 10), torch.randn(4, 8, 6)
    latent, turned, q = torch.randn(2, 1, 9, 8), torch.randn(2, 1, 9, 4), torch.randn(2, 4, 3, 10)
    keys, values = Biased().expand_kv(latent, turned)
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=0.3)
    got = LatentHandle(Dense(), latent, turned).attend(Biased(), q, keys, values, None, 0.3)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
