"""A cache goes in and out of torch.inference_mode(): what is read in there is continued outside, and the other way."""

import pytest
import torch

import kvfold
from models import subject, tokens

MODES = [torch.inference_mode, torch.no_grad, torch.enable_grad]
METHODS = [
    "full",
    "kvfold",
    "snapkv",
    "h2o",
    "kvmerger",
    "kivi(residual=32)",
    "fp8",
    "minicache",
    "adakv",
    "streamingllm",
]


def conversation(model, cache, modes):
    """Logits of a prompt, turns of one and of several tokens, a crop and a choice of rows, each in a mode."""
    text, at, found = tokens(60, 60)["input_ids"], 0, []
    mask = torch.ones_like(text)
    for step, (mode, count) in enumerate(zip(modes, (17, 1, 1, 14, 1, 9, 1, 1), strict=True)):
        with mode():
            new = text[:, at : at + count]
            out = model(new, past_key_values=cache, attention_mask=mask[:, : at + count]).logits
            if step == 6 and not any(getattr(layer, "conv_states", None) for layer in cache.layers):
                cache.reorder_cache(torch.tensor([1, 0]))
            at += count
        found.append(out.detach().clone())
    return found


@pytest.mark.parametrize("name,method", [*(("llama", method) for method in METHODS), ("gemma3", "h2o"),
                                         ("qwen3-next", "full")])  # fmt: skip
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_in_and_out(name, method, turn):
    model = subject(name)
    options = {} if method in ("full", "kivi(residual=32)", "fp8", "minicache") else {"budget": 0.5}
    modes = [MODES[(turn + step * (1 + step // 3)) % 3] for step in range(8)]
    got = conversation(model, kvfold.Cache(model, method, **options), modes)
    expected = conversation(model, kvfold.Cache(model, method, **options), [torch.no_grad] * 8)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cut", range(60, 70, 3))
def test_a_prefix_of_any_length_is_continued(cut, tmp_path):
    """A step finds pages that are full, half full, and such that have to be made."""
    model, ids = subject("llama"), tokens(90)["input_ids"]
    cache = kvfold.Cache(model, "snapkv", budget=0.5)
    with torch.inference_mode():
        model(ids[:, :cut], past_key_values=cache)
        twin = cache.fork()
        cache.save(tmp_path / "c")
        loaded = kvfold.Cache.load(tmp_path / "c", model)
    said = [
        model.generate(ids[:, : cut + 6], past_key_values=each, max_new_tokens=4, do_sample=False)
        for each in (cache, twin, loaded)
    ]
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])


def test_an_arena_made_inside():
    model = subject("llama")
    with torch.inference_mode():
        arena = kvfold.Arena(1 << 22)
        first = kvfold.Cache(model, "h2o", budget=0.5, arena=arena)
        model(tokens(40)["input_ids"], past_key_values=first)
        second = first.fork()
    for cache in (first, second):
        cache.crop(-3)
        model.generate(tokens(60)["input_ids"][:, :50], past_key_values=cache, max_new_tokens=3, do_sample=False)


def test_what_kernels_on_a_device_read():
    model, ids = subject("llama"), tokens(30)["input_ids"]
    cache = kvfold.Cache(model, "full")
    table = None
    for mode, count in ((torch.inference_mode, 20), (torch.no_grad, 1), (torch.inference_mode, 1), (torch.no_grad, 1)):
        with mode():
            model(ids[:, :count], past_key_values=cache)
            table = cache.paged[0].segments[0][1].table
            lengths = table.on_device()[1]
        assert not lengths.is_inference() and lengths.tolist() == table.lengths.tolist()
