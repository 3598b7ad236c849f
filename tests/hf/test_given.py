"""A cache given twice: `generate` goes on where the text ends that the cache has read, or says so."""

import copy
import io

import pytest
import torch

import kvfold
from models import build, dynamic, subject, tokens

OPTIONS = {"max_new_tokens": 5, "do_sample": False}
ASSISTED = {**OPTIONS, "prompt_lookup_num_tokens": 3}
CHUNKS = {**OPTIONS, "prefill_chunk_size": 8}
ALL = pytest.mark.parametrize("options", [OPTIONS, CHUNKS, {**OPTIONS, "num_beams": 1}], ids=["plain", "chunks", "one"])


def used(method="snapkv", length=30, **options):
    model = subject("llama")
    cache = kvfold.Cache(model, method, **options)
    return model, cache, model.generate(**tokens(length), past_key_values=cache, **OPTIONS)


@ALL
@pytest.mark.parametrize("length", [20, 34, 35, 60])
def test_another_prompt_is_refused(length, options):
    model, cache, _ = used()
    held = cache.kept(0)
    with pytest.raises(ValueError, match=r"has read 34 tokens.*cache\.reset\(\)"):
        model.generate(**tokens(length, seed=9), past_key_values=cache, **options)
    assert cache.kept(0) == held and cache.get_seq_length() == 34
    cache.reset()
    again = model.generate(**tokens(length, seed=9), past_key_values=cache, **OPTIONS)
    fresh = model.generate(**tokens(length, seed=9), past_key_values=kvfold.Cache(model, "snapkv"), **OPTIONS)
    assert torch.equal(again, fresh)


def test_the_same_prompt_again_is_refused():
    model, cache, _ = used()
    with pytest.raises(ValueError, match="nothing behind them"):
        model.generate(inputs=tokens(30)["input_ids"], past_key_values=cache, **OPTIONS)


@ALL
def test_all_of_the_text_or_what_is_new(options):
    found = []
    for whole in (True, False):
        model, cache, text = used("full")
        text = torch.cat([text, tokens(12, seed=2)["input_ids"]], 1)
        mask, new = torch.ones_like(text), text if whole else text[:, cache.get_seq_length() :]
        found.append(model.generate(new, attention_mask=mask, past_key_values=cache, **options)[:, -5:])
    assert torch.equal(*found)


def test_assisted_decoding_reads_only_what_is_new():
    """transformers gives it the whole text again."""
    model, cache, text = used("full")
    text = torch.cat([text, tokens(12, seed=2)["input_ids"]], 1)
    said = model.generate(text, past_key_values=cache, **ASSISTED)
    assert cache.get_seq_length() == said.shape[1] - 1
    assert torch.equal(said, model.generate(text, past_key_values=kvfold.Cache(model, "full"), **OPTIONS))


def test_padding_is_nobodys_text():
    model = subject("llama")
    cache, prompt = kvfold.Cache(model, "full"), tokens(20, 14)
    text = model.generate(**prompt, past_key_values=cache, **OPTIONS)
    text[1, :6] = 50  # padded
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, text.shape[1] - 20, dtype=torch.long)], 1)
    model.generate(text, attention_mask=mask, past_key_values=cache, **OPTIONS)


@pytest.mark.parametrize("change", ["crop", "fork", "take", "tentative", "rows"])
def test_what_is_known_goes_with_the_rows(change, tmp_path):
    model = subject("llama")
    cache, text = kvfold.Cache(model, "full"), tokens(20, 20)["input_ids"]
    with torch.no_grad():
        model(text, past_key_values=cache)
        if change == "crop":
            cache.crop(-5)
            text = torch.cat([text[:, :15], tokens(9, 9, seed=1)["input_ids"]], 1)
        elif change == "fork":
            cache = cache.fork()
        elif change == "take":
            cache, text = cache.take([1]), text[1:]
        elif change == "rows":
            cache.batch_select_indices(torch.tensor([1, 0]))
            text = text.flip(0)
        else:
            with cache.tentative():
                model(text, past_key_values=cache)
    wrong = text.clone()
    wrong[-1, 3] += 1
    text, wrong = (torch.cat([x, tokens(*[4] * len(x), seed=3)["input_ids"]], 1) for x in (text, wrong))
    with pytest.raises(ValueError, match="at column 3"):
        model.generate(wrong, past_key_values=cache, **OPTIONS)
    model.generate(text, past_key_values=cache, **OPTIONS)


def test_what_nobody_knows_is_not_compared(tmp_path):
    """Of a file, of joined rows, of embeddings."""
    model, cache, text = used("full")
    cache.save(tmp_path / "c")
    text[0, 3] += 1
    model.generate(text, past_key_values=kvfold.Cache.load(tmp_path / "c", model), **OPTIONS)
    told = kvfold.Cache(model, "full")
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(text), past_key_values=told)
    model.generate(torch.cat([text, text], 1), past_key_values=told, **OPTIONS)


def test_no_cache_and_a_cache():
    model = subject("llama")
    for call, more in ((model.generate, OPTIONS), (model, {})):
        cache = kvfold.Cache(model, "full")
        with pytest.raises(ValueError, match="use_cache=False"), torch.no_grad():
            call(**tokens(9), past_key_values=cache, use_cache=False, **more)
        assert cache.get_seq_length() == 0


def test_transformers_own_caches_and_copies_of_the_model_are_left_alone():
    model, prompt = build("llama"), tokens(9)
    plain = model.generate(**prompt, **OPTIONS)
    kvfold.Cache(model, "full")
    twin = copy.deepcopy(model)
    torch.save(model, stored := io.BytesIO())
    stored.seek(0)
    for each in (model, twin, torch.load(stored, weights_only=False)):
        assert torch.equal(each.generate(**prompt, past_key_values=dynamic(each), **OPTIONS), plain)
        assert each.generate.module is each


@pytest.mark.parametrize("name,method", [("llama", "fastkv"), ("llama", "attention-gate"), ("llava", "look-m")])
def test_a_model_with_hooks_can_be_saved(name, method):
    model, prompt = build(name), tokens(30)
    said = model.generate(**prompt, past_key_values=kvfold.Cache(model, method), **OPTIONS)
    torch.save(model, stored := io.BytesIO())
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    for each in (again, copy.deepcopy(model)):
        assert torch.equal(each.generate(**prompt, past_key_values=kvfold.Cache(each, method), **OPTIONS), said)


def test_attention_weights_that_nobody_has():
    model = subject("llama")
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    for call, more in ((model.generate, {**OPTIONS, **asked}), (model, {"output_attentions": True})):
        cache = kvfold.Cache(model, "full")
        with pytest.raises(ValueError, match="output_attentions=True"), torch.no_grad():
            call(**tokens(9), past_key_values=cache, **more)
        assert cache.get_seq_length() == 0
