"""LESS's training: what it learns from is what a cache reads, and it learns."""

import random
import re
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import kvfold
from calibrated import feature_maps
from folding import slow_read
from kvfold.calibration import Run
from kvfold.calibration import less as training
from kvfold.formats.feature_maps import bring, maps_of
from kvfold.methods.h2o import H2O
from models import VOCAB, build, subject, tokens

WORDS = [f"word{i}" for i in range(60)]
TEXTS = [("words", " ".join(random.Random(0).choices(WORDS, k=2000)))]


class Words:
    """A tokenizer of words, a token each."""

    bos_token_id = 1

    def __call__(self, text, **_):
        return SimpleNamespace(
            input_ids=[3 + zlib.crc32(word.encode()) % (VOCAB - 3) for word in re.findall(r"\w+", text)]
        )


def test_training_answers_as_a_cache_does():
    """The loss is taken of what a cache gives: the same prompt cut, the same queries behind it."""
    model, ids, views = subject("llama"), tokens(48)["input_ids"], []
    full = kvfold.Cache(model, "full")
    with full.observed(views.append), torch.no_grad():
        model(ids, past_key_values=full)
    maps = maps_of(bring(feature_maps(3, 4, 2, 16, weight=0.3)), 1, torch.device("cpu"))
    (case,) = training.cases_of(views[1], 32, [H2O(budget=0.25)], torch.tensor([32, 40, 47]))
    assert_close(case.full, views[1].queries.read[:, :, [32, 40, 47]].float(), atol=1e-4, rtol=1e-4)
    found = training.answer(maps, case)
    for n, at in enumerate((32, 40, 47)):
        for head in range(4):
            gone = case.gone[0, head // 2].nonzero()[:, 0].tolist()
            kept = [t for t in range(at + 1) if t not in gone]
            k, v, q = views[1].keys[0], views[1].values[0], case.q[0, head, n]
            assert len(gone) == 24
            assert_close(found[0, head, n], slow_read(maps, head, q, k, v, gone, kept), atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        error, alone, size = training.errors(views[1].place.module, case, case.kept)
        none = training.errors(views[1].place.module, case, case.full)[0]
    assert float(error) == float(alone) > 0 and float(size) > 0
    assert float(none) == 0.0


def test_training_lowers_the_loss(monkeypatch):
    monkeypatch.setattr(training, "BUDGETS", (0.1, 0.3))
    monkeypatch.setattr(training, "RATE", 1e-2)
    model, said = build("llama"), []
    wanted = [weight.requires_grad for weight in model.parameters()]
    before = [weight.clone() for weight in model.parameters()]
    made = training.train_feature_maps(Run(model, Words(), TEXTS, 0, 12, 96, tick=said.append, about=(about := {})))
    assert about["loss at the end"] < 0.9 * about["loss at the start"] and about["loss at the start"] < 1.05
    assert len(said) == 12 and said[-1].startswith("step 12 of 12: error 0.")
    assert [weight.requires_grad for weight in model.parameters()] == wanted
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {name: tuple(each.shape) for name, each in made.items()} == {
        "q1": (3, 4, 16, 64), "q2": (3, 4, 64, 8), "k1": (3, 2, 16, 64), "k2": (3, 2, 64, 8), "k3": (3, 2, 8, 8),
        "s1": (3, 2, 8), "s2": (3, 2, 8),
    }  # fmt: skip
    assert all(each.dtype == torch.bfloat16 for each in made.values())


def test_the_rate_falls_in_the_last_third():
    trainer = training.Trainer(subject("llama"), 3, rate=0.01)
    rates = []
    for done in (0.0, 0.6, 0.9, 0.99):
        trainer.slow_down(done)
        rates.append(trainer.adams[2].param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.01, 0.003, 0.001])
    assert all(isinstance(weight, nn.Parameter) for weight in trainer.layers[0].values())
