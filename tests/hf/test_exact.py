"""With everything kept, a kvfold cache is transformers' own cache; without one, "kvfold" is "sdpa"."""

import warnings

import pytest
import torch
from transformers import StaticCache

import kvfold
from models import PAGED, build, dynamic, feed, follow, greedy, grow, reference, subject, tokens

BATCHES = {"one": (23,), "batch": (23, 23), "padded": (23, 9, 1)}
DROPPING = [info.slug for info in kvfold.list_methods() if "budget" in info.options]


def make(name: str, method="full", dtype=torch.float32, **options):
    model = subject(name, dtype)
    return model, kvfold.Cache(model, method, **options)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", PAGED)
def test_full_is_the_dynamic_cache(name, lengths):
    prompt = tokens(*lengths)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    expected, logits = greedy(reference(name), dynamic(reference(name)), ids, mask, 64)
    model, cache = make(name)
    got, ours = greedy(model, cache, ids, mask, 64)
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    assert expected.unique().numel() > 5  # not a model that says one word for ever


@pytest.mark.parametrize("name", PAGED)
def test_generate_with_a_padded_batch(name):
    prompt = tokens(*BATCHES["padded"])
    expected = reference(name).generate(**prompt, max_new_tokens=64, do_sample=False)
    model, cache = make(name)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, max_new_tokens=64, do_sample=False), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", PAGED)
def test_narrow_dtypes(name, dtype):
    prompt = tokens(*BATCHES["padded"])
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    forced, truth = greedy(reference(name), dynamic(reference(name)), ids, mask, 16)
    theirs = follow(reference(name, dtype), dynamic(reference(name)), ids, mask, forced[:, :-1]).float()
    model, cache = make(name, dtype=dtype)
    ours = follow(model, cache, ids, mask, forced[:, :-1]).float()
    # As far from float32 as transformers is in this dtype, give or take a half.
    assert (ours - truth).square().mean().sqrt() < 1.5 * (theirs - truth).square().mean().sqrt() + 1e-6
    assert cache.paged[0].segments[0][1].pool.planes["keys"].dtype == dtype


def test_all_sliding_warns_and_is_exact():
    prompt = tokens(*BATCHES["padded"])
    expected, logits = greedy(reference("mistral-sliding"), dynamic(reference("mistral-sliding")), *prompt.values(), 64)
    with pytest.warns(UserWarning, match="MistralForCausalLM has no layer with full attention"):
        model, cache = make("mistral-sliding")
    got, ours = greedy(model, cache, *prompt.values(), 64)
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    assert cache.paged == [] and cache.kept_tokens == 0.0
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held <= cache.nbytes <= 1.2 * held + 8 * len(cache.layers)


def test_windows_free_what_leaves_them():
    prompt = tokens(200)
    model, cache = make("gemma3")
    feed(model, cache, *prompt.values())
    windows = [layer for layer in cache.layers if layer.is_sliding]
    assert len(windows) == 2
    for layer in windows:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes == 7 * 2 * 16 * 4


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("slug", DROPPING)
def test_budget_one_is_full(slug, name):
    prompt = tokens(*BATCHES["padded"])
    expected, logits = greedy(reference(name), dynamic(reference(name)), *prompt.values(), 24)
    model, cache = make(name, slug, budget=1.0)
    got, ours = greedy(model, cache, *prompt.values(), 24)
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    for core in cache.paged:
        assert core.counts().tolist() == [[23 + 23] * 2, [9 + 23] * 2, [1 + 23] * 2]


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", [*PAGED, "mistral-sliding"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_without_our_cache_kvfold_is_sdpa(name, kind, lengths):
    prompt = tokens(*lengths)

    def caches(model):
        if kind == "none":
            return None
        return dynamic(model) if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=64)

    model = subject(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        kvfold.Cache(model)
    assert (model.config._attn_implementation == "kvfold") == (name in PAGED)
    theirs, ours = caches(reference(name)), caches(model)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    for _ in range(3):
        expected = feed(reference(name), theirs, ids, mask)
        got = feed(model, ours, ids, mask)
        real = mask[:, -ids.shape[1] :].bool()
        assert torch.equal(got[real], expected[real])
        if kind == "none":
            break
        ids, mask = expected[:, -1:].argmax(-1), grow(mask)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate_without_our_cache(name):
    prompt = tokens(*BATCHES["padded"])
    model, _ = make(name)
    options = dict(max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
    got, expected = model.generate(**prompt, **options), reference(name).generate(**prompt, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True))


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_linear_attention_is_left_alone(lengths):
    prompt = tokens(*lengths)
    expected, logits = greedy(reference("qwen3-next"), dynamic(reference("qwen3-next")), *prompt.values(), 32)
    model, cache = make("qwen3-next")
    got, ours = greedy(model, cache, *prompt.values(), 32)
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=0)
    assert [core.layer for core in cache.paged] == [1, 3]
    with pytest.raises(ValueError, match="layer=0 is not one of the layers with full attention"):
        cache.kept(0)


def test_a_hybrid_model_with_a_budget():
    prompt = tokens(40, 31)
    model, cache = make("qwen3-next", "snapkv", budget=0.5, window=4)
    feed(model, cache, *prompt.values())
    assert [core.counts().tolist() for core in cache.paged] == [[[20, 20], [16, 16]], [[20, 20], [15, 15]]]
    states = [cache.layers[i].recurrent_states[0] for i in (0, 2)]
    _, exact = make("qwen3-next")
    feed(model, exact, *prompt.values())
    # Layer 0 comes before any eviction, and a prompt is read with full attention: its states are the same.
    for index, state in zip((0, 2), states, strict=True):
        assert torch.equal(state, exact.layers[index].recurrent_states[0])


def test_another_seed_is_another_model():
    prompt = tokens(23)
    a, b = build("llama"), build("llama", seed=1)
    assert not torch.allclose(feed(a, None, *prompt.values()), feed(b, None, *prompt.values()), atol=0.1)
