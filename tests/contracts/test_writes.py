"""No step touches more tokens than it must: what is written and what is read of each segment, counted."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import kvfold
from kvfold import Store
from kvfold.formats import DenseSegment, Fp8, Fp8Segment, Int4Segment
from models import feed, grow, subject, tokens

pytestmark = pytest.mark.usefixtures("scratch_methods")


@pytest.fixture
def counted(monkeypatch):
    """Tokens appended, written over and worked out in full, by kind of segment."""
    found: Counter = Counter()

    def watch(cls, name, count):
        original = getattr(cls, name)

        def watched(self, *args, **kwargs):
            found[f"{cls.__name__}.{name}"] += count(self, *args)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, watched)

    for cls in (DenseSegment, Fp8Segment):
        watch(cls, "append", lambda self, chunk: int(chunk.valid.sum()))
        watch(cls, "amend", lambda self, slots, *_: int((slots >= 0).sum()))
        watch(cls, "states", lambda self, what: int(self.counts().sum()))
    watch(DenseSegment, "step", lambda self, q, k, *_: k.shape[0] * k.shape[1])
    watch(Fp8Segment, "step", lambda self, q, k, *_: 0)  # it appends
    watch(Int4Segment, "dense", lambda self: 0)
    return found


def steps(method, counted, count=6, name="llama"):
    """What so many steps count, of two rows, two heads and three layers: a token a step is 12."""
    model = subject(name)
    cache = kvfold.Cache(model, method)
    prompt = tokens(40, 30)
    feed(model, cache, *prompt.values())
    mask = prompt["attention_mask"]
    for step in range(count + 2):
        if step == 2:
            counted.clear()
        mask = grow(mask)
        feed(model, cache, torch.tensor([[5 + step], [7]]), mask)
    return cache, {name: number / count / 12 for name, number in counted.items() if number}


@pytest.mark.parametrize("form", ["full", "fp8", "h2o(budget=0.5) | fp8", "streamingllm(budget=12) | fp8"])
def test_a_step_writes_its_own_token_and_decodes_none(form, counted):
    _, found = steps(form, counted)
    expected = {"DenseSegment.step": 1.0} if form == "full" else {"Fp8Segment.append": 1.0}
    assert found == expected


def test_all_but_the_last_eight_in_another_format(counted):
    """One new token: one goes to the open segment, one leaves it, and only keys and values of that one move."""

    @kvfold.method("but-eight", title="All but the last eight", kind="quantize")
    @dataclass(frozen=True)
    class ButEight(kvfold.Method):
        def after_prefill(self, view):
            return Store(Fp8(), view.valid & ~view.last(8))

        after_decode = after_prefill

    cache, found = steps(ButEight(), counted)
    assert found.pop("Fp8Segment.append") == 1.0
    assert found.pop("DenseSegment.append", 0) + found.pop("DenseSegment.step", 0) == 1.0
    assert found.pop("DenseSegment.states") <= 2 * 9  # where the token that moves is looked up
    assert not found  # no code is worked out, none is written again
    for core in cache.paged:
        dense, coded = (segment.counts() for _, segment in core.segments)
        assert (dense == 8).all() and (coded.sum(1) == (core.seen - 8) * 2).all()
        assert core.kept() == [[list(range(n))] * 2 for n in core.seen]


@pytest.mark.parametrize("form", ["fp8", "int4(group=8, channels=8, tail=8, requantise=True)"])
def test_codes_stay_what_they_were_while_a_method_merges(form, counted):
    """CaM changes some values at every step: those tokens' codes alone are written, the others are the same bytes."""
    model = subject("llama")
    cache = kvfold.Cache(model, f"streamingllm(budget=20) | {form}")
    prompt = tokens(60, 41)
    feed(model, cache, *prompt.values())
    before = {name: plane.clone() for name, plane in cache.paged[1].segments[0][1].state()[1].items()}
    kept = cache.kept(1)
    feed(model, cache, torch.tensor([[5], [7]]), grow(prompt["attention_mask"]))
    after = cache.paged[1].segments[0][1].state()[1]
    assert [k[1:] for k in cache.kept(1)[0]] != [k[1:] for k in kept[0]]
    if form == "fp8":
        old, new = (planes["keys"].view(2, 2, 20, -1) for planes in (before, after))
        assert torch.equal(new[:, :, :4], old[:, :, :4]) and torch.equal(new[:, :, 4:-1], old[:, :, 5:])
