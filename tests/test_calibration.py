"""Calibrations on tiny models: known losses, the layer error against a second pass, the whole way to an artefact."""

import json
import random
import re
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.calibration import CALIBRATIONS, TRAINED, Run, calibrate, duo, errors
from kvfold.calibration.questions import COPY, REASON, NeedleQuestion, questions
from kvfold.methods.compresskv import CompressKV
from models import VOCAB, build, subject

TEXTS = [("story", "It was a dark and stormy night, and the rain fell in torrents. " * 40)]


class Words:
    """A tokenizer of words and punctuation marks, a token each."""

    chat_template = None
    bos_token_id, eos_token_id = 1, 2
    all_special_ids = [0, 1, 2]

    def __len__(self):
        return VOCAB

    def __call__(self, text, **_):
        words = re.findall(r"\w+|[^\w\s]", text)
        return SimpleNamespace(input_ids=[3 + zlib.crc32(word.encode()) % (VOCAB - 3) for word in words])


class Template(Words):
    chat_template = "yes"

    def apply_chat_template(self, messages, **_):
        return f"<user>{messages[0]['content']}<answer>"


def run_of(model, tokenizer=None, **options) -> Run:
    return Run(model, tokenizer or Words(), TEXTS, **options)


@pytest.mark.parametrize("tokenizer", [Words(), Template()])
@pytest.mark.parametrize("kind", ["copy", "reason"])
def test_the_needle_stands_where_the_question_says(tokenizer, kind):
    run = run_of(None, tokenizer)
    needles = [each[0] for each in COPY] if kind == "copy" else [each[1] for each in REASON]
    for i, asked in enumerate(questions(run, kind, 8, 600)):
        assert asked.needle == tokenizer(f" {needles[i % 4]}").input_ids
        assert asked.prompt.shape[1] + len(asked.answer) <= 600
        assert asked.fed.shape[1] == asked.prompt.shape[1] + len(asked.answer) - 1
    again = [asked.prompt for asked in questions(run, kind, 8, 600)]
    assert all(torch.equal(a, b.prompt) for a, b in zip(again, questions(run, kind, 8, 600), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_duo_open_gates_are_the_teacher_and_shut_ones_a_streaming_model(name, monkeypatch):
    monkeypatch.setattr(duo, "SINKS", 2)
    monkeypatch.setattr(duo, "RECENT", 5)
    model = build(name)
    before = model.config._attn_implementation
    paged = [core.layer for core in kvfold.Cache(model).paged]
    ids = torch.randint(3, VOCAB, (1, 40))
    gates = torch.ones(len(paged), 2)
    mixer = duo.Mixer(gates, paged)
    with duo.mixing(model, mixer):
        assert float(duo.distance(model, mixer, ids, 10)) == 0.0
        gates.zero_()
        mixer.student = True
        shut = model.get_decoder()(ids, use_cache=False).last_hidden_state
    assert model.config._attn_implementation == "kvfold" and before == "sdpa"
    assert all(weight.requires_grad for weight in model.parameters())
    # Token by token the method gives each query what a streaming mask gives it.
    cache = kvfold.Cache(model, "duoattention", sparsity=1.0, sinks=2, recent=5)
    steps = [model.get_decoder()(ids[:, i : i + 1], past_key_values=cache).last_hidden_state for i in range(40)]
    assert_close(torch.cat(steps, 1), shut, atol=1e-4, rtol=1e-3)


def test_passkeys_end_in_their_questions():
    run = run_of(None)
    ids, tail = duo.passkeys(run, random.Random(0), 1200)
    key = Words()("It is: ").input_ids
    ends = [i for i in range(tail) if ids[0, ids.shape[1] - tail :].tolist()[i : i + len(key)] == key]
    assert len(ends) == 4 and ids[0, 0] == 1 and 300 <= ids.shape[1] <= 1201
    for start in ends:  # the words that answer stand in the text, too
        answer = ids[0, ids.shape[1] - tail :].tolist()[start + len(key) :][:8]
        assert any(ids[0, i : i + 8].tolist() == answer for i in range(ids.shape[1] - tail))


def test_a_layer_error_is_zero_when_all_is_kept():
    model, views = subject("llama"), []
    asked = NeedleQuestion(torch.randint(3, VOCAB, (1, 50)), [4, 5, 6], (10, 14))
    cache = kvfold.Cache(model, "full")
    with cache.observed(views.append), torch.no_grad():
        model(asked.fed, past_key_values=cache)
    tables = {"heads": ((0.1, 0.2, 0.3, 0.4),) * 3, "errors": (1.0,) * 3}
    found = [errors.layer_error(views[1], asked, CompressKV(budget=n, window=4, **tables)) for n in (50, 40, 8)]
    assert found[0] < 1e-5 < found[1] < found[2]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("method", sorted({*CALIBRATIONS} - {"memory"}))  # what no method takes: tests/hf/test_bits.py
def test_every_calibration_makes_what_its_method_takes(method, name, monkeypatch, tmp_path):
    from kvfold.artefacts import save

    monkeypatch.setattr("kvfold.calibration.heads.COUNTS_FROM", 0.0)  # a random model answers nothing
    model = build(name)
    size = {"razorattention": 81, "duoattention": 600}.get(method, 500)
    made = calibrate(method, run_of(model, samples=2, length=size), name="tiny")
    assert method in TRAINED or json.loads(json.dumps(made.data)) == made.data
    path = save(made, tmp_path / ("made.safetensors" if method in TRAINED else "made.json"))
    options = {"basis": "measured"} if method == "turboquant" else {}  # which does without one, too
    cache = kvfold.Cache(model, method, calibration=str(path), **options)
    with torch.no_grad():
        assert model(torch.randint(3, VOCAB, (1, 60)), past_key_values=cache).logits.isfinite().all()


def test_refused():
    with pytest.raises(ValueError, match="method='snapkv' needs no calibration; those that do: a2ats, attention-gate"):
        calibrate("snapkv", run_of(subject("llama")))
    with pytest.raises(ValueError, match="answered none of the 2 prompts of kind 'copy'"):
        calibrate("headkv", run_of(subject("llama"), samples=2, length=500))
    with pytest.raises(ValueError, match=r"length=100: .* one of 20 tokens has no room"):
        next(questions(run_of(None), "copy", 1, 100))


def test_a_length_without_room_says_how_long_it_must_be():
    run = run_of(None, Template())
    with pytest.raises(ValueError, match=r"length=128: .* one of 25 tokens has no room .* at least (\d+)") as said:
        next(questions(run, "copy", 4, 128))
    least = int(str(said.value).rpartition(" ")[2])
    assert next(questions(run, "copy", 4, least)).prompt.numel() < least / 5
    with pytest.raises(ValueError, match="length="):
        next(questions(run, "copy", 4, least - 5))
    with pytest.raises(ValueError, match="texts: one has"):
        next(questions(run, "copy", 4, 9000))
