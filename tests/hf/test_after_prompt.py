"""`after_prompt`: a method reads on from a prompt, leaves no trace, and decides for all layers."""

from dataclasses import dataclass

import pytest
import torch

import kvfold
from kvfold import Keep, Method
from kvfold.hf.prompt import Prompt
from kvfold.hf.shared_prefill import prefill_many
from kvfold.layer.plan import Plan
from kvfold.views import ReadOn
from models import build, feed, follow, subject, tokens

pytestmark = pytest.mark.usefixtures("scratch_methods")
STEPS = torch.arange(5, 15).view(2, 5)


def asking():
    """A method that reads its prompt's last two tokens again and keeps ten tokens; and what it saw."""
    seen = []

    @kvfold.method("test-asking", title="Asking", kind="evict")
    @dataclass(frozen=True)
    class Asking(Method):
        def after_prompt(self, prompt):
            views = []
            yield ReadOn(prompt.ids[:, -2:], prompt.valid[:, -2:], views.append)
            seen.append((prompt.ids.tolist(), prompt.valid.sum(1).tolist(), [view.new for view in views]))
            return {i: Keep(prompt[i].last(10)) for i in range(len(prompt))}

    return Asking(), seen


def counts(cache) -> list:
    return [core.counts()[:, 0].tolist() for core in cache.paged]


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_a_prompt_is_read_on_and_then_cut(name):
    method, seen = asking()
    prompt = tokens(30, 21)
    model, cache = subject(name), kvfold.Cache(subject(name), method)
    logits = follow(model, cache, *prompt.values(), STEPS[:, :2])
    layers = len(cache.paged)
    assert seen == [(prompt["input_ids"].tolist(), [30, 21], [2] * layers)]  # once, and not for generated tokens
    assert counts(cache) == [[12, 12]] * layers and cache.paged[0].prompt.tolist() == [30, 21]
    full = follow(model, kvfold.Cache(model, "full"), *prompt.values(), STEPS[:, :2])
    assert torch.equal(logits[:, 0], full[:, 0]) and logits.isfinite().all()


def test_every_chunk_of_a_prompt_is_one():
    method, seen = asking()
    ids = tokens(30)["input_ids"]
    model, cache = build("llama"), None
    cache = kvfold.Cache(model, method, prefill_chunk=12)
    with torch.no_grad():
        out = model(ids, past_key_values=cache)
    assert out.logits.shape[1] == 30 and counts(cache) == [[10]] * 3
    assert [part for (part,), _, _ in seen] == [part.tolist() for part in ids[0].split(12)]


def test_not_in_tentative_passes():
    method, seen = asking()
    prompt = tokens(30)
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), method)
    with cache.tentative():
        feed(model, cache, *prompt.values())
    with cache.undecided():
        feed(model, cache, *prompt.values())
    assert seen == [] and counts(cache) == [[30]] * 3


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_one_prefill_for_many(name):
    method, seen = asking()
    prompt = tokens(30, 21)
    model = subject(name)
    own, adopted = kvfold.Cache(model, method), kvfold.Cache(model, method)
    prefill_many(model, prompt, [adopted])
    assert len(seen) == 1
    feed(model, own, *prompt.values())
    assert seen[0] == seen[1] and [c.kept() for c in own.paged] == [c.kept() for c in adopted.paged]


def test_assisted_decoding_waits_for_the_crop():
    method, seen = asking()
    model = build("llama")
    cache = kvfold.Cache(model, method)
    ids = tokens(20)["input_ids"]
    model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=6, do_sample=False)
    assert len(seen) == 1 and seen[0][0][0][:20] == ids[0].tolist() and max(cache.paged[0].kept()[0][0]) >= 20


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_turn_after_assisted_decoding_is_a_prompt(name):
    """No crop comes after it: the next pass, or whoever asks, finds that it was none of the drafts."""
    method, seen = asking()
    model = build(name)
    cache = kvfold.Cache(model, method)
    ids = tokens(20)["input_ids"]
    said = model.generate(ids, past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=6, do_sample=False)
    assert len(seen) == 1
    layers, more = len(cache.paged), tokens(12, seed=1)["input_ids"]
    for number, asked in enumerate((torch.cat([said[:, cache.get_seq_length() :], more], 1), more), 2):
        width = cache.get_seq_length()
        with torch.no_grad():
            model(asked, past_key_values=cache)
            model(more[:, :1], past_key_values=cache)
        assert len(seen) == number and seen[-1] == (asked.tolist(), [asked.shape[1]], [2] * layers)
        assert counts(cache) == [[11]] * layers
        assert cache.paged[0].prompt.tolist() == [width + asked.shape[1]]


def test_a_composition_hands_it_on():
    method, seen = asking()
    model = subject("llama")
    cache = kvfold.Cache(model, kvfold.parse("streamingllm(budget=20)") | method)
    feed(model, cache, *tokens(30).values())
    assert counts(cache) == [[10]] * 3 and len(seen) == 1


def test_a_model_without_a_tokenizer_says_nothing():
    cache = kvfold.Cache(build("llama"), "full")
    prompt = Prompt(cache, Plan(prefill=True, token_ids=torch.ones(1, 1, dtype=torch.long)))
    assert prompt.encode("Once more.") == prompt.answer() == []


def test_a_template_gives_the_way_to_the_answer(monkeypatch):
    class Words:
        chat_template = "yes"

        def __call__(self, text, add_special_tokens):
            return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

        def apply_chat_template(self, turn, tokenize, add_generation_prompt):
            return f"<{turn[0]['content']}>:"

    monkeypatch.setattr("kvfold.hf.prompt.tokenizer_of", lambda place: Words())
    prompt = Prompt(
        kvfold.Cache(build("llama"), "full"), Plan(prefill=True, token_ids=torch.ones(1, 1, dtype=torch.long))
    )
    assert prompt.answer() == [ord(">"), ord(":")] and prompt.encode("a") == [ord("a")]
