"""No step touches more tokens than it must: what is written and what is read of each segment, counted."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

import kvfold
from kvfold import Store
from kvfold.formats import DenseSegment, Fp8, Fp8Segment
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


def bytes_by_position(cache, layer: int) -> dict[tuple[int, int, int], bytes]:
    """What the pages hold of each token's key and value, by row, head and place in the text."""
    segment = cache.paged[layer].segments[0][1]
    said, planes = segment.state()
    heads = torch.tensor(said["counts"]).flatten().tolist()
    owners = [(i // 2, i % 2) for i, count in enumerate(heads) for _ in range(count)]
    names = [name for name in ("keys", "values", "key_scale", "value_scale") if name in planes]
    rows = zip(*(planes[name].reshape(len(owners), -1) for name in names), strict=True)
    places = planes["position"].tolist()
    return {
        (*owner, place): b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        for owner, place, parts in zip(owners, places, rows, strict=True)
    }


def test_codes_stay_what_they_were_while_a_method_merges(counted):
    """CaM adds the value of what leaves to the next tokens, at every step: those are written, the others are the same.

    One token leaves each of two heads, and its value goes to the three that follow it.
    """
    model = subject("llama")
    cache = kvfold.Cache(model, "cam(budget=20, score='streamingllm', targets=3, draw='expected') | fp8")
    prompt = tokens(60, 41)
    feed(model, cache, *prompt.values())
    mask = grow(prompt["attention_mask"])
    feed(model, cache, torch.tensor([[5], [7]]), mask)
    before = [bytes_by_position(cache, layer) for layer in range(3)]
    counted.clear()
    feed(model, cache, torch.tensor([[6], [8]]), grow(mask))
    after = [bytes_by_position(cache, layer) for layer in range(3)]
    changed = 0
    for old, new in zip(before, after, strict=True):
        assert len(old) == len(new) == 80 and len(new.keys() - old.keys()) == 4
        differs = [key for key in old.keys() & new.keys() if old[key] != new[key]]
        assert all(old[key][:16] == new[key][:16] for key in differs)  # values alone
        changed += len(differs)
    assert 0 < changed <= 3 * 4 * 3 and counted["Fp8Segment.amend"] <= 3 * 4 * 3
    assert counted["Fp8Segment.append"] == 12


def test_what_a_merge_rewrites_is_what_it_changes():
    """A second prompt under kvmerger: stored tokens that no merge touches keep their bytes, in whatever format."""
    model, prompt = subject("llama"), tokens(60)
    cache = kvfold.Cache(model, "kvmerger(budget=0.9, skip=()) | fp8")
    feed(model, cache, *prompt.values())
    before = bytes_by_position(cache, 1)
    feed(model, cache, tokens(6, seed=4)["input_ids"], grow(prompt["attention_mask"], 6))
    after = bytes_by_position(cache, 1)
    same = [key for key in before.keys() & after.keys() if before[key] == after[key]]
    assert len(same) > 0.6 * len(before)
