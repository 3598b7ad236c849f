"""Long prompts go through each layer in parts: what is cut and what is not, and that windows read their band alone."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

import kvfold
from kvfold.hf.band import Band, BandLength, alike, band_mask
from kvfold.hf.call import splitting
from kvfold.hf.call.splitting import InParts, can_cut, decoder_layers, part_of_argument
from kvfold.layer.parts import Parts
from models import build, dynamic, feed, greedy, reference, subject, tokens, without_collection

READ_IN_PARTS = ["llama", "qwen3", "mistral", "phi3", "gemma3", "yarn", "ntk", "qwen3-next"]


@pytest.fixture
def split(monkeypatch):
    """The layers that read in parts, one entry for each time."""
    found, run = [], InParts._in_parts

    def noted(self, *given):
        found.append(self.module.self_attn.layer_idx)
        return run(self, *given)

    monkeypatch.setattr(InParts, "_in_parts", noted)
    return found


@pytest.mark.parametrize("name", READ_IN_PARTS)
def test_parts_give_what_transformers_cache_gives(name, split):
    prompt = tokens(45, 30)
    expected, logits = greedy(reference(name), dynamic(reference(name)), *prompt.values(), 5)
    cache = kvfold.Cache(subject(name), part_size=7)
    assert splitting.reads_in_parts(cache)  # asked once a model, by passes in parts
    split.clear()
    with torch.no_grad():
        got, ours = greedy(subject(name), cache, *prompt.values(), 5)
    assert torch.equal(got, expected)
    torch.testing.assert_close(ours, logits, atol=2e-4, rtol=0)
    attending = [i for i, layer in enumerate(cache.layers) if hasattr(layer, "core") or hasattr(layer, "band")]
    assert split == attending


def test_a_model_whose_layers_get_their_cache_by_place_is_read_at_once(split):
    prompt = tokens(45)
    whole, parts = (kvfold.Cache(subject("gpt2"), part_size=size) for size in (0, 7))
    assert torch.equal(*(feed(subject("gpt2"), cache, *prompt.values()) for cache in (whole, parts)))
    assert split == []


def test_the_size_of_parts_is_for_long_prompts_on_the_cpu(split, monkeypatch):
    monkeypatch.setattr(splitting, "PART", 16)
    model = subject("llama")
    assert splitting.reads_in_parts(kvfold.Cache(model))
    split.clear()
    feed(model, kvfold.Cache(model), *tokens(16).values())
    feed(model, kvfold.Cache(model, part_size=0), *tokens(40).values())
    assert split == []
    feed(model, kvfold.Cache(model), *tokens(17).values())
    assert split == [0, 1, 2]


def test_with_a_gradient_a_prompt_is_read_at_once(split):
    model = subject("llama")
    cache = kvfold.Cache(model, part_size=7)
    out = model(**tokens(20), past_key_values=cache)
    assert out.logits.requires_grad and split == []


def test_a_model_that_says_something_else_in_parts_is_read_at_once(split):
    """Its MLP adds the mean of what it is given, so that a token's answer depends on which come with it."""
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: output + output.mean(1, keepdim=True))
    whole, parts = (kvfold.Cache(model, part_size=size) for size in (0, 7))
    prompt = tokens(40)
    with torch.no_grad():
        expected = feed(model, whole, *prompt.values())
        split.clear()
        assert torch.equal(feed(model, parts, *prompt.values()), expected)
    asked = len(split)  # by the passes that found out
    assert asked == len(model.model.layers)
    feed(model, kvfold.Cache(model, part_size=7), *prompt.values())
    assert len(split) == asked


def test_a_pass_that_fails_while_it_is_asked_is_made_again(split, caplog):
    model = build("llama")
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *given: 1 / 0)
    cache = kvfold.Cache(model, part_size=7)
    assert not splitting.reads_in_parts(cache)
    assert any("ZeroDivisionError" in line.message for line in caplog.records)
    handle.remove()
    assert splitting.reads_in_parts(cache)


def test_part_size_is_checked():
    with pytest.raises(ValueError, match="part_size=-1"):
        kvfold.Cache(subject("llama"), part_size=-1)


def test_forks_and_takes_keep_the_size():
    cache = kvfold.Cache(subject("llama"), part_size=7)
    feed(subject("llama"), cache, *tokens(9, 5).values())
    assert cache.fork().part_size == cache.take([1]).part_size == 7


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_progress_ends_at_one_and_never_falls(name):
    model, told = subject(name), []
    cache = kvfold.Cache(model, "snapkv", budget=0.5, part_size=8)
    with torch.no_grad(), cache.progressing(told.append):
        feed(model, cache, *tokens(40).values())
    assert told == sorted(told) and told[-1] == 1.0 and len(told) >= 5 * len(cache.layers)
    before = len(told)
    with torch.no_grad(), cache.progressing(told.append):
        model(torch.tensor([[5]]), past_key_values=cache)
    assert len(told) == before


def test_a_layer_that_reads_in_parts_keeps_no_model_alive():
    model = build("llama")
    feed(model, kvfold.Cache(model, part_size=4), *tokens(9).values())
    left = weakref.ref(model.model.layers[0])
    with without_collection():
        del model
        assert left() is None


def test_a_call_that_fails_between_parts_leaves_nothing(monkeypatch):
    model = build("llama")
    expected = feed(subject("llama"), kvfold.Cache(subject("llama")), *tokens(30).values())
    cache, calls = kvfold.Cache(model, part_size=8), []

    def fail(module, args, output):
        calls.extend([0] * (output.shape[1] == 8))  # not those in which the model is asked how it reads with this hook
        if len(calls) == 3:
            raise KeyError("broken")

    handle = model.model.layers[0].mlp.register_forward_hook(fail)
    with torch.no_grad(), pytest.raises(KeyError, match="broken"):
        feed(model, cache, *tokens(30).values())
    handle.remove()
    assert cache.call.parts is None
    cache.reset()
    torch.testing.assert_close(feed(model, cache, *tokens(30).values()), expected, atol=2e-4, rtol=0)


def test_what_is_recorded_of_layers_is_whole():
    model = subject("llama")
    found = []
    for size in (0, 7):
        with torch.no_grad():
            out = model(**tokens(30), past_key_values=kvfold.Cache(model, part_size=size), output_hidden_states=True)
        found.append(out.hidden_states)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)


# -- what is cut ---------------------------------------------------------------------------------------------


def test_arguments_are_cut_along_their_tokens():
    parts = Parts(10)
    parts.reach(4)
    parts.reach(7)
    wide = torch.arange(20).view(2, 10)
    assert torch.equal(part_of_argument("position_ids", wide, parts), wide[:, 4:7])
    assert torch.equal(part_of_argument("attention_mask", torch.ones(2, 13), parts), torch.ones(2, 10))
    assert part_of_argument("attention_mask", torch.ones(2, 1, 10, 13), parts).shape == (2, 1, 3, 10)
    assert part_of_argument("per_layer_input", torch.ones(2, 10, 5), parts).shape == (2, 3, 5)
    cosine, sine = part_of_argument("position_embeddings", (torch.ones(1, 10, 4), torch.ones(1, 10, 4)), parts)
    assert cosine.shape == sine.shape == (1, 3, 4)
    assert part_of_argument("use_cache", True, parts) is True
    for name, x in (
        ("alibi", torch.ones(4, 1, 10)),
        ("shared", {"k": torch.ones(1)}),
        ("attention_mask", torch.ones(10)),
    ):
        assert not can_cut(name, x, 10)


def test_no_layers_are_found_where_two_attend():
    model = build("llama")
    model.model.layers[0].other = model.model.layers[1].self_attn
    assert decoder_layers(model) == []


# -- the band ------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the most numbers of any tensor that an operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            self.most = max(self.most, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("lengths", [(400,), (400, 250)])
def test_a_long_prompt_over_windows_makes_no_mask_of_tokens_by_tokens(lengths):
    model, most = subject("gemma3"), []
    for factor in (1, 2):
        prompt = tokens(*(length * factor // 2 for length in lengths))
        with torch.no_grad(), Largest() as seen:
            model(**prompt, past_key_values=kvfold.Cache(model, part_size=0), logits_to_keep=1)
        most.append(seen.most)
    assert most[1] <= 2.2 * most[0]


@pytest.mark.parametrize("lengths", [(20,), (20, 9), (20, 20)])
def test_windows_give_what_transformers_give_over_further_turns(lengths):
    theirs, ours = dynamic(reference("gemma3")), kvfold.Cache(subject("gemma3"), part_size=5)
    (ids, mask), more = tokens(*lengths).values(), tokens(*(11 for _ in lengths), seed=3)["input_ids"]
    for new in (ids, more, more[:, :1], more[:, :7]):
        if new is not ids:
            mask = torch.cat([mask, torch.ones_like(new)], 1)
        with torch.no_grad():
            expected, got = (feed(m("gemma3"), c, new, mask) for m, c in ((reference, theirs), (subject, ours)))
        real = mask[:, -new.shape[1] :].bool()
        torch.testing.assert_close(got[real], expected[real], atol=2e-4, rtol=0)


def test_padding_between_tokens_counts_in_a_window():
    """Columns count, as in transformers: a further turn whose rows end at different places."""
    theirs, ours = dynamic(reference("gemma3")), kvfold.Cache(subject("gemma3"))
    ids, mask = tokens(12, 9).values()
    more, gap = tokens(6, 2, seed=4).values()
    for new, whole in ((ids, mask), (more, torch.cat([mask, gap], 1))):
        with torch.no_grad():
            expected, got = (feed(m("gemma3"), c, new, whole) for m, c in ((reference, theirs), (subject, ours)))
        real = whole[:, -new.shape[1] :].bool()
        torch.testing.assert_close(got[real], expected[real], atol=2e-4, rtol=0)


def test_a_gradient_comes_through_a_window():
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (6, 9, 9))
    module = torch.nn.Module()
    out, _ = Band(3).attend(module, q, k, v, None, 0.3, dropout=0.0)
    out.sum().backward()
    assert v.grad is not None and bool((v.grad[:, :, 0] == 0).all()) and bool((v.grad[:, :, 8] != 0).any())


def test_masks_that_are_no_band_are_made():
    kwargs = {"batch_size": 1, "q_length": 9, "kv_length": BandLength(9, 4), "q_offset": 0, "kv_offset": 0}
    assert band_mask({**kwargs, "mask_function": sliding_window_causal_mask_function(4)}) is None
    other = sliding_window_causal_mask_function(5)
    for function in (other, causal_mask_function):
        expected = sdpa_mask(**{**kwargs, "mask_function": function, "allow_is_causal_skip": False})
        assert torch.equal(band_mask({**kwargs, "mask_function": function}), expected)
    padding = torch.ones(2, 9, dtype=torch.bool)
    given = {**kwargs, "batch_size": 2, "mask_function": sliding_window_causal_mask_function(4)}
    assert band_mask({**given, "attention_mask": padding}) is None
    padding[0, 0] = False
    assert band_mask({**given, "attention_mask": padding}) is padding
    assert not alike(lambda: 1, lambda: 1) and alike(3, 3) and not alike(other, sliding_window_causal_mask_function(6))
