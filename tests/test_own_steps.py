"""Steps of methods that look at the tokens of their own format alone: no other is looked at, and nothing differs."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Spec
from kvfold.formats.paged import PagedSegment
from kvfold.formats.tailed import TailedSegment
from kvfold.layer import layer as layers
from kvfold.layer.plan import Plan
from kvfold.layer.stored import Stored
from kvfold.methods import parse
from kvfold.views.decisions import Store
from models import feed, follow, grow, subject, tokens
from views import random_view

METHODS = ["mikv(ratio=0.3)", "mikv(ratio=0.3) | fp8", "snapkv(budget=0.5) | mikv", "zipcache(group=8, gap=5)"]
STEPS = torch.arange(5, 29).view(2, 12)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_looks_at_no_token_that_is_coded(method, monkeypatch):
    model, prompt, asked = subject("llama"), tokens(60, 41), []
    cache = kvfold.Cache(model, method)
    feed(model, cache, *prompt.values())
    coded = {id(s.coded if isinstance(s, TailedSegment) else s) for layer in cache.paged for _, s in layer.segments[1:]}
    whole, columns = Stored.tokens, PagedSegment.columns

    def counted(self):
        asked.append(self)
        return whole(self)

    def noted(self):
        asked.extend([self] if id(self) in coded else [])
        return columns(self)

    monkeypatch.setattr(Stored, "tokens", counted)
    monkeypatch.setattr(PagedSegment, "columns", noted)
    assert len(coded) == 3 * (2 if "zip" in method else 1)
    for step in range(12):
        feed(model, cache, STEPS[:, step : step + 1], grow(prompt["attention_mask"], step + 1))
    assert asked == []
    cache.kept(0)
    assert len(asked) >= 2  # the stubs are those that are called


@pytest.mark.parametrize("method", METHODS)
def test_it_decides_what_it_does_where_it_sees_all(method, monkeypatch):
    """Another turn in between, after which tokens of the first lie in front of later ones."""
    model, prompt = subject("llama"), tokens(60, 41)
    found = []
    for shown in (True, False):
        if not shown:
            monkeypatch.setattr(Stored, "shows_own", False)
        cache = kvfold.Cache(model, method)
        logits = follow(model, cache, *prompt.values(), STEPS)
        mask = grow(prompt["attention_mask"], 12)
        feed(model, cache, STEPS[:, :9], grow(mask, 9))
        for step in range(6):
            last = feed(model, cache, STEPS[:, step : step + 1], grow(mask, 10 + step))
        where = [
            [(form, segment.columns()[1][POSITION][segment.columns()[0]].tolist()) for form, segment in layer.segments]
            for layer in cache.paged
        ]
        found.append((logits, last, where))
    assert found[0][2] == found[1][2]
    for mine, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_an_open_segment_out_of_order_is_not_shown():
    stored = Stored(Spec(1, 1, 8, 8, torch.float32, torch.device("cpu")))
    stored.number(Dense())
    for place in (3, 4, 5, 2, 7):
        states = torch.full((1, 1, 1, 8), float(place))
        at = torch.full((1, 1, 1), place, dtype=torch.int32)
        stored.append(Chunk(states, states, torch.ones(1, 1, 1, dtype=torch.bool), {POSITION: at}))
        assert stored.shows_own  # nobody said that something was moved here
    stored.ordered = False
    assert not stored.shows_own
    other = stored.fork()
    other.segments[0][1].keep(torch.tensor([[[True, True, True, False, True]]]), {}, slack=True)
    assert other.shows_own and not stored.shows_own
    other.number(Dense(torch.bfloat16))
    other.opened[:] = 1
    assert not other.shows_own


def test_what_moves_to_the_open_segment_takes_its_order_away():
    model, plan = subject("llama"), Plan(prefill=False)
    cache = kvfold.Cache(model, "mikv(ratio=0.3)")
    prompt = tokens(20)
    feed(model, cache, *prompt.values())
    feed(model, cache, STEPS[:1, :1], grow(prompt["attention_mask"], 1))
    layer = cache.paged[0]
    assert layer.stored.shows_own and not layer.stored.ordered
    view = layer.view(plan)
    coded = view.valid & (view.home == 1)
    layer.moment(plan).carry_out([Store(Dense(), coded & (coded.cumsum(-1) == 1))], 0)  # the first of each head
    assert not layer.stored.shows_own and layer.stored.positions() == [[list(range(21))] * 2]


def test_whose_steps_look_at_their_own_tokens_alone():
    said = {
        "mikv": True, "mikv(policy='tova')": False, "mikv(policy='keyformer')": False, "zipcache": True, "full": True,
        "snapkv | mikv": True, "h2o": False, "snapkv": True, "h2o(budget=0.5) | mikv": False,
    }  # fmt: skip
    assert {text: parse(text).own_steps for text in said} == said


def test_attention_of_some_tokens_in_the_softmax_of_all():
    view = random_view(B=2, H=2, G=3, T=30, D=8, left_pad=(0, 7))
    whole = view.attention(4)
    left = view.tokens.since(11)
    some = replace(view, tokens=left, elsewhere=view.count - left.valid.sum(-1), memo={})
    assert_close(some.attention(4), whole[..., 11:], atol=1e-6, rtol=1e-5)
    assert torch.equal(some.total, view.count) and torch.equal(view.total, view.count)
    rows = some.of_rows(torch.tensor([1]), view.place, {POSITION})
    assert torch.equal(rows.total, view.count[1:])


def test_a_step_at_which_nothing_is_decided_writes_nothing(monkeypatch):
    model, prompt, calls = subject("llama"), tokens(60, 41), []
    cache = kvfold.Cache(model, "zipcache(group=8, gap=5)")
    feed(model, cache, *prompt.values())
    whole = layers.commit

    def counted(*given, **named):
        calls.append(given)
        whole(*given, **named)

    monkeypatch.setattr(layers, "commit", counted)
    for step in range(12):
        feed(model, cache, STEPS[:, step : step + 1], grow(prompt["attention_mask"], step + 1))
    assert len(calls) == 3 * 2  # layers, and steps at which five tokens had come
