"""A2ATS's calibration on a tiny model: the moment of queries, centres that fit, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.calibration import calibrate, codebooks
from kvfold.calibration.codebooks import DISTANCE, factor, identifiers, lost
from kvfold.methods.a2ats import codebooks as layers_of
from models import build, subject
from test_calibration import run_of


def test_the_factor_is_of_the_scaled_moment():
    x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = x.mT @ x
    turn = factor(moment).double()
    scaled = moment / moment.square().mean((1, 2), keepdim=True).sqrt()
    assert_close(turn @ turn.mT, scaled, atol=1e-4, rtol=0)
    assert torch.equal(turn, turn.tril())
    assert factor(torch.zeros(1, 4, 4, dtype=torch.float64)).isfinite().all()  # a head that nobody asks


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_it_measures_what_the_model_does(name, monkeypatch):
    """Keys before RoPE and queries at one distance, against a pass that rotates nothing."""
    model, found = build(name), {}
    plain = codebooks.look

    def looked(*given):
        found["seen"] = plain(*given)
        return found["seen"]

    monkeypatch.setattr(codebooks, "look", looked)
    made = calibrate("a2ats", run_of(model, samples=2, length=200, codes=16), name="tiny")
    fitted, held = found["seen"]
    books = layers_of(made.data)
    assert made.provenance["codes"] == 16 and [book.distance for book in books] == [DISTANCE] * len(books)
    assert len(fitted) == len(books) == made.model["layers"] and len(fitted[0].keys) == 3 and len(held[0].keys) == 1
    for book, seen, error in zip(books, fitted, made.provenance["error"], strict=True):
        z = torch.cat(seen.keys, 1) @ book.turn
        which = book.codes(torch.cat(seen.keys, 1)[None])[0]
        near = (z[:, :, None] - book.centres[:, None].float()).square().sum(-1)
        assert_close(near.gather(-1, which[..., None])[..., 0], near.amin(-1), atol=1e-3, rtol=1e-3)
        assert lost(z, book.centres.float()) < 0.9 and 0 < error < 1.5
    rope, ids = kvfold.Cache(model).paged[0].site.rope, torch.randint(3, 90, (1, 30))
    cache = kvfold.Cache(model, "full")
    with cache.observed(lambda view: found.setdefault(view.place.ordinal, codebooks.add(here, view))):
        here = codebooks.HeadsSeen()
        model(ids, past_key_values=cache)
    stored, _ = cache.paged[0].stored.tokens()
    back = rope.shift(here.keys[0][None], stored.positions)
    assert_close(back, stored.keys.float(), atol=1e-4, rtol=0)


def test_the_same_again_and_another_seed():
    run = {"samples": 1, "length": 200, "codes": 8}
    one, two, other = (
        calibrate("a2ats", run_of(subject("llama"), **run, seed=seed), name="tiny").data for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one["centres"], other["centres"])


def test_as_many_vectors_as_there_are_keys_for():
    made = calibrate("a2ats", run_of(subject("llama"), samples=1, length=100), name="tiny")
    assert made.data["centres"].shape[2] == 2 * 100 // 4  # a text and a random one
    with pytest.raises(ValueError, match="codes=201 must be at most 200"):
        calibrate("a2ats", run_of(subject("llama"), samples=1, length=100, codes=201))


def test_random_text_is_of_identifiers_and_its_seed():
    import random

    run = run_of(subject("llama"))
    one, two = (identifiers(run, random.Random(3), 150) for _ in range(2))
    assert one.shape == (1, 150) and torch.equal(one, two)
    assert not torch.equal(one, identifiers(run, random.Random(4), 150))
