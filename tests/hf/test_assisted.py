"""Assisted decoding over several turns: budgets hold, and what recorded its past stops when no crop comes any more."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config
from transformers.generation.streamers import BaseStreamer

import kvfold
from kvfold.hf.layers import held_bytes
from models import COMMON, build, subject, tokens

LOOKUP = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 6, "do_sample": False}
PLAIN = {"max_new_tokens": 6, "do_sample": False}
NOTHING_TO_LOOK_UP = {**LOOKUP, "max_matching_ngram_size": 30}


def turns(cache, options, lengths=(60, 40, 40)):
    """What is held after each of a conversation's turns, and what was read and said."""
    text, held = torch.zeros(1, 0, dtype=torch.long), []
    for seed, length in enumerate(lengths):
        more = tokens(length // 2, seed=seed)["input_ids"].repeat(1, 2)  # something to look up
        text = go_on(cache, torch.cat([text[:, -1:], more], 1), options)
        held.append(cache.kept_tokens)
    return held, text


def go_on(cache, new, options):
    """Assisted decoding reads all that it is given: only what the cache has not read."""
    mask = torch.ones(1, cache.get_seq_length() + new.shape[1], dtype=torch.long)
    return cache.model.generate(new, attention_mask=mask, past_key_values=cache, **options)


@pytest.mark.parametrize("method", ["snapkv", "h2o", "kvmerger", "streamingllm", "cake", "kvzip"])
def test_every_turn_is_within_the_budget(method):
    held, _ = turns(kvfold.Cache(subject("llama"), method, budget=12), LOOKUP)
    assert max(held) <= 12 + 5


@pytest.mark.parametrize("method", ["snapkv", "h2o", "cake", "pyramidkv"])
def test_turns_without_candidates_keep_what_plain_ones_keep(method):
    caches = [kvfold.Cache(subject("llama"), method, budget=12) for _ in range(2)]
    (_, said), (_, expected) = turns(caches[0], PLAIN), turns(caches[1], NOTHING_TO_LOOK_UP)
    assert torch.equal(said, expected)
    assert caches[0].kept(1) == caches[1].kept(1)
    assert caches[0].rows.prompt.tolist() == caches[1].rows.prompt.tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral-sliding"])
@pytest.mark.filterwarnings("ignore:.*has no layer with full attention")
def test_full_says_what_it_says_without_a_draft(name):
    _, said = turns(kvfold.Cache(subject(name), "full"), LOOKUP)
    assert torch.equal(said, turns(kvfold.Cache(subject(name), "full"), PLAIN)[1])


@pytest.mark.parametrize("method", ["snapkv(window=4)", "kvfold", "decoding(snapkv)"])
def test_several_tokens_behind_which_no_crop_comes_are_a_prompt(method):
    """Recording, a pass over several tokens looks like a draft until the next pass comes instead of a crop."""
    model, more, kept = subject("llama"), tokens(21)["input_ids"], []
    for recording in (False, True):
        cache = kvfold.Cache(model, method, budget=12)
        read(model, cache, tokens(40)["input_ids"])
        if recording:
            cache.activate_past_recording()
            read(model, cache, more[:, :1])
            cache.crop(41)
        else:
            read(model, cache, more[:, :1])
        read(model, cache, more[:, 1:])
        cache.settle_pending()
        assert cache.rows.prompt.tolist() == [61]
        kept.append([cache.kept(core.layer) for core in cache.paged])
    assert kept[0] == kept[1]


def test_going_on_without_more_text_is_no_prompt():
    cache = kvfold.Cache(subject("llama"), "snapkv", budget=12)
    _, text = turns(cache, LOOKUP)
    before = cache.rows.prompt.tolist()
    go_on(cache, text[:, -1:], {**PLAIN, "assistant_model": build("llama")})
    assert cache.rows.prompt.tolist() == before


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_plain_and_assisted_turns_by_turns(name):
    """A plain turn's events wait for a crop; the assisted decoding after it is not its crop."""
    model, cache = subject(name), kvfold.Cache(subject(name), "snapkv", budget=12)
    for options in (LOOKUP, PLAIN, LOOKUP, LOOKUP):
        held, text = turns(cache, options, lengths=(40,))
        assert held[-1] <= 12 + 5
        read(model, cache, torch.cat([text[:, -1:], tokens(20)["input_ids"]], 1))  # its event may wait
    assert cache.kept_tokens == 12


def test_a_further_prompt_that_its_format_refuses():
    cache = kvfold.Cache(subject("llama"), "snapkv | kivi(residual=32)")
    _, text = turns(cache, LOOKUP, lengths=(40,))
    with pytest.raises(ValueError, match="requantise=True"):
        go_on(cache, torch.cat([text[:, -1:], tokens(9)["input_ids"]], 1), LOOKUP)


LOOKS = {
    "kept_tokens": lambda cache, path: cache.kept_tokens,
    "kept": lambda cache, path: cache.paged and cache.kept(cache.paged[0].layer),
    "report": lambda cache, path: str(cache.report()),
    "fork": lambda cache, path: read(cache.model, cache.fork(), tokens(2)["input_ids"]),
    "take": lambda cache, path: cache.rows.batch and cache.take([0]).kept_tokens,
    "copy": lambda cache, path: copy.deepcopy(cache).report(),
    "save": lambda cache, path: cache.save(path),
    "tentative": lambda cache, path: aside(cache),
}


def aside(cache):
    with cache.tentative():
        read(cache.model, cache, tokens(3)["input_ids"])


class Looking(BaseStreamer):
    """Looks at a cache whenever it hears of tokens: of a draft's before those that were refused are cropped."""

    def __init__(self, look):
        self.look, self.found = look, []

    def put(self, value):
        self.found.append(self.look())

    def end(self):
        self.put(None)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("gemma3", "h2o"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llama", "snapkv"), ("llama", "cake"), ("llama", "kvzip"), ("mistral-sliding", "full"),
                         ("lfm2", "full"))
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*has no layer with full attention")
def test_whoever_looks_changes_nothing(name, method, look, tmp_path):
    model = lfm2() if name == "lfm2" else subject(name)
    options = {} if method == "full" else {"budget": 12}
    cache, alone = (kvfold.Cache(model, method, **options) for _ in range(2))
    prompt = tokens(20)["input_ids"].repeat(1, 2)
    streamer = Looking(lambda: LOOKS[look](cache, tmp_path / "c"))
    said = model.generate(prompt, past_key_values=cache, streamer=streamer, **LOOKUP)
    assert len(streamer.found) > 2
    assert torch.equal(said, model.generate(prompt, past_key_values=alone, **LOOKUP))
    assert [core.kept() for core in cache.paged] == [core.kept() for core in alone.paged]
    assert not cache.pending.recording
    more = tokens(9, seed=1)["input_ids"]
    assert torch.equal(read(model, cache, more), read(model, alone, more))


def test_a_copy_between_a_draft_and_its_crop_takes_the_draft_for_text(tmp_path):
    """And decides: nothing of it waits, and a file of it is the same."""
    cache = kvfold.Cache(subject("llama"), "snapkv", budget=12)
    found = []

    def look():
        cache.save(tmp_path / "c")
        found.append((cache.kept_tokens, cache.fork(), kvfold.Cache.load(tmp_path / "c", cache.model)))

    prompt = tokens(20)["input_ids"].repeat(1, 2)
    cache.model.generate(prompt, past_key_values=cache, streamer=Looking(look), **LOOKUP)
    _, (held, fork, loaded), *_ = found  # the first: before anything was read
    assert held > 40 and fork.kept_tokens == 12 and not fork.pending.recording
    assert fork.kept(0) == loaded.kept(0) and fork.rows.prompt.tolist() == [held]


def test_caches_join_after_assisted_decoding():
    model = subject("gemma3")
    caches = [kvfold.Cache(model, "full") for _ in range(2)]
    for seed, cache in enumerate(caches):
        model.generate(tokens(30, seed=seed)["input_ids"], past_key_values=cache, **LOOKUP)
    caches[0].join(caches[1])
    assert caches[0].rows.batch == 2


@torch.no_grad()
def read(model, cache, ids):
    """Logits of a call of the model."""
    return model(ids, past_key_values=cache).logits


def lfm2():
    """A model whose convolutions can be taken back."""
    config = Lfm2Config(**COMMON, layer_types=["conv", "full_attention", "conv"], conv_L_cache=3)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["gemma3", "mistral-sliding", "lfm2"])
@pytest.mark.parametrize("prompt", [2, 30])
@pytest.mark.filterwarnings("ignore:.*has no layer with full attention")
def test_what_recorded_its_past_is_over_with_the_last_crop(name, prompt, tmp_path):
    """Then a plain turn, a fork and a file go on as a cache that never recorded."""
    model = lfm2() if name == "lfm2" else subject(name)
    cache, other = kvfold.Cache(model, "full"), kvfold.Cache(model, "full")
    text = model.generate(tokens(prompt)["input_ids"], past_key_values=cache, **LOOKUP)
    read(model, other, text[:, :-1])
    for length in (1, 12, 1, 1):
        more = tokens(length, seed=length)["input_ids"]
        torch.testing.assert_close(read(model, cache, more), read(model, other, more), rtol=1e-4, atol=1e-4)
        twin = cache.fork()
        cache.save(tmp_path / "c")
        loaded = kvfold.Cache.load(tmp_path / "c", model)
        expected = read(model, other.fork(), tokens(5)["input_ids"])
        for again in (twin, loaded):
            torch.testing.assert_close(read(model, again, tokens(5)["input_ids"]), expected, rtol=1e-4, atol=1e-4)
        sizes = [
            [held for held, layer in zip(held_bytes(x.layers), x.layers, strict=True) if not hasattr(layer, "core")]
            for x in (cache, other)
        ]
        assert sizes[0] == sizes[1]


def test_windows_give_back_the_prompt_at_a_crop():
    cache = kvfold.Cache(subject("gemma3"), "full")
    subject("gemma3").generate(tokens(200)["input_ids"], past_key_values=cache, **LOOKUP)
    window = cache.layers[0].keys
    assert window.untyped_storage().nbytes() == window.nbytes
