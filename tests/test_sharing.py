"""Layers that share tokens over the life of a cache: what a crop, a rewrite and a further turn leave of it."""

import pytest
import torch

import kvfold
from kvfold.formats import DepthSegment
from kvfold.methods.minicache import MiniCache
from models import feed, follow, grow, subject, tokens

STEPS = torch.arange(5, 45).view(2, 20)


def pair(cache) -> list[DepthSegment]:
    """What the second and third layers share, of each the segment."""
    return [next(x for _, x in core.segments if isinstance(x, DepthSegment)) for core in cache.paged[1:]]


def shared(cache, row: int) -> list[list[int]]:
    """Text positions of a row's tokens that lie on shared pages, by head."""
    stored = pair(cache)[0].dense()
    return [places[seen].tolist() for places, seen in zip(stored.positions[row], stored.valid[row], strict=True)]


def test_what_comes_instead_of_what_was_cropped_is_shared_too():
    model, prompt = subject("llama"), tokens(60, 44)
    cache = kvfold.Cache(model, "minicache")
    feed(model, cache, *prompt.values())
    cache.crop(-30)
    feed(model, cache, tokens(30, 30, seed=1)["input_ids"], prompt["attention_mask"])
    for row, (length, left) in enumerate(((60, 30), (44, 14))):
        for head in shared(cache, row):
            assert len(head) > 0.8 * length and sum(place >= left for place in head) > 20
    below, above = pair(cache)
    assert below.twin(above) and below.upto.tolist() == [60, 44]


def test_a_crop_is_heeded_before_anything_else_comes():
    cache = kvfold.Cache(subject("llama"), "minicache")
    feed(cache.model, cache, *tokens(40, 10).values())
    fork = cache.fork()
    cache.crop(-15)
    assert pair(cache)[0].upto.tolist() == [25, 0] and pair(fork)[0].upto.tolist() == [40, 10]


@pytest.mark.parametrize("text", ["d2o(budget=0.6)", "cam(budget=0.6)"])
def test_a_rewrite_parts_two_layers_and_forgets_nothing(text):
    model, prompt = subject("llama"), tokens(60, 44)
    mask, cache = prompt["attention_mask"], kvfold.Cache(model, f"{text} | minicache(gamma=0.1, residual=6)")
    feed(model, cache, *prompt.values())
    told, parted = pair(cache)[0].remembered.clone(), []
    for step in range(7):
        mask = grow(mask)
        feed(model, cache, STEPS[:, step : step + 1], mask)
        below, above = pair(cache)
        assert torch.equal(below.remembered, told)
        assert below.upto.tolist() == ([60, 44] if step < 5 else [66, 50])
        assert step != 5 or (below.twin(above) and below.counts().all())
        parted.append(not below.twin(above))
    assert any(parted[:5])


def test_a_further_turn_counts_only_its_own_tokens_as_prompt(monkeypatch):
    """Generated tokens that still wait are shared with it, but tell nothing of the range of distances."""
    model, prompt = subject("llama"), tokens(40, 30)
    choose, asked = MiniCache.choose, []

    def watched(self, both):
        asked.append((both.lower.positions.clone(), both.valid.clone(), both.prompt.clone()))
        return choose(self, both)

    monkeypatch.setattr(MiniCache, "choose", watched)
    cache = kvfold.Cache(model, "minicache(residual=8)")
    follow(model, cache, *prompt.values(), STEPS[:, :5])
    asked.clear()
    feed(model, cache, STEPS[:, 5:12], grow(prompt["attention_mask"], 12))
    ((positions, valid, new),) = asked
    for row, length in enumerate((40, 30)):
        assert set(positions[row][new[row]].tolist()) == set(range(length + 5, length + 12))
        assert set(positions[row][valid[row]].tolist()) >= set(range(length, length + 12))


@pytest.mark.parametrize("late", ["kvzip", "speckv", 'kvfold(quality="best")'])
def test_methods_that_decide_after_the_prompt_are_refused_beside_it(late):
    for text in (f"{late} | minicache", f"minicache | {late}", f"snapkv | minicache | {late}"):
        with pytest.raises(ValueError, match=r"lets layers share tokens that .* would drop afterwards"):
            kvfold.parse(text)
    assert kvfold.parse("kvfold | minicache").shares_layers and not kvfold.parse(f"snapkv | {late}").shares_layers
