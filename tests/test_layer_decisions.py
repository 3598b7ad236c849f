"""What a layer makes of decisions at its edges: tokens out of order, columns of others, what a crop took back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import kvfold
from kvfold.formats import POSITION, Chunk, Dense, Spec
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.layer.stored import Stored
from kvfold.methods.base import Method
from kvfold.views.decisions import Keep, Read, Rewrite
from models import feed, grow, subject, tokens
from views import random_view

NOTED = "noted"


def say_nothing(view: Any) -> None:
    """No decision."""


class Told(Method):
    """Does at a prompt and at a token what it is told."""

    def __init__(self, prompt: Callable[[Any], Any] = say_nothing, token: Callable[[Any], Any] = say_nothing):
        self.prompt, self.token = prompt, token

    def after_prefill(self, view):
        return self.prompt(view)

    def after_decode(self, view):
        return self.token(view)

    def __str__(self) -> str:
        return "told"


class Blind(Method):
    """Reads nothing that is stored."""

    def before_attend(self, view):
        return Read(torch.zeros_like(view.valid))


def note(view):
    return Keep(view.valid, {NOTED: torch.ones(view.valid.shape)})


def read(layer: KVLayer, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Passes of so many random tokens; what the last one gave, and its values."""
    generator = torch.Generator().manual_seed(0)
    for place, length in enumerate(lengths):
        q, k, v = (torch.randn(1, heads, length, 8, generator=generator) for heads in (4, 2, 2))
        out = layer.attend(q, k, v, None, 0.3, Plan(prefill=not place))
    return out, v


def test_a_rewritten_token_has_the_columns_that_it_was_given_and_no_others():
    def rewrite(view):
        return Rewrite(Chunk(view.keys, view.values, view.valid, {POSITION: view.positions}))

    layer = KVLayer(Rows(Told(note, rewrite)), 0)
    read(layer, [6, 1])
    columns = layer.segments[0][1].columns()[1]
    assert not columns[NOTED].any() and columns[POSITION][0, 0].tolist() == list(range(7))


def test_a_token_reads_itself_whatever_a_method_says():
    out, values = read(KVLayer(Rows(Blind()), 0), [6, 1])
    torch.testing.assert_close(out, values.repeat_interleave(2, 1))


def test_which_segment_holds_a_token():
    view = replace(random_view(T=7), bounds=(3, 3, 5))
    assert view.home[0, 0].tolist() == [0, 0, 0, 2, 2, -1, -1]
    order = torch.tensor([4, 0, 3, 2, 1]).expand(*view.valid.shape[:2], 5)
    assert replace(view, order=order).home[0, 0].tolist() == [2, 0, 2, 0, 0, -1, -1]


def test_a_fraction_is_of_the_prompt_however_much_is_generated():
    """A layer with the largest share has no more than the prompt, as it had when that ended."""
    view = random_view(B=1, H=2, T=20)
    for seen, budget, held in ((10, 0.9, 10), (20, 0.9, 10), (20, 9, 16)):
        place = replace(view.place, paged=(0, 1), prompt=torch.tensor([10]), seen=torch.tensor([seen]))
        assert replace(view, place=place).budget(budget, [(0.9, 0.1)]).tolist() == [[held] * 2]


@pytest.mark.parametrize("left", range(9))
def test_a_crop_is_by_place_in_the_text_whatever_the_order_of_a_segment(left):
    """As where tokens were moved to a segment that held later ones."""
    stored, generator = Stored(Spec(1, 2, 8, 8, torch.float32, torch.device("cpu"))), torch.Generator().manual_seed(0)
    order = [5, 6, 7, 1, 2, 8, 0]
    keys = torch.randn(1, 2, 7, 8, generator=generator)
    places = torch.tensor(order, dtype=torch.int32).expand(1, 2, 7)
    stored.of(Dense()).append(Chunk(keys, keys, torch.ones(1, 2, 7, dtype=torch.bool), {POSITION: places}))
    stored.ordered = False
    stored.drop_from(np.array([left]))
    assert stored.positions() == [[sorted(place for place in order if place < left)] * 2]
    held, _ = stored.tokens()
    kept = [place for place in sorted(order) if place < left]
    assert torch.equal(held.keys[held.valid], torch.cat([keys[0, h, [order.index(x) for x in kept]] for h in (0, 1)]))


def test_an_event_after_a_crop_has_the_queries_that_were_left():
    model, prompt, found = subject("llama"), tokens(20, 13), []

    def look(view):
        found.append((view.queries.positions.tolist(), view.queries.states, view.queries.lse))

    cache, plain = kvfold.Cache(model, Told(look, look)), kvfold.Cache(model, Told(look, look))
    cache.activate_past_recording()
    mask, ids = prompt["attention_mask"], torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    feed(model, cache, *prompt.values())
    cache.crop(0)
    found.clear()
    feed(model, cache, ids, grow(mask, 4))
    cache.crop(-2)
    mine = found[:]
    found.clear()
    feed(model, plain, *prompt.values())
    found.clear()
    feed(model, plain, ids[:, :2], grow(mask, 2))
    assert len(mine) == len(found) == 3
    for (places, states, lse), (want, *others) in zip(mine, found, strict=True):
        assert places == want == [[20, 21], [13, 14]]
        torch.testing.assert_close([states, lse], others)


def test_a_method_sees_no_columns_of_another_one():
    model, seen = subject("llama"), []
    one, two = kvfold.Cache(model, Told(note, note)), kvfold.Cache(model, Told(token=lambda view: seen.append(view)))
    prompts = tokens(12), tokens(12, seed=1)
    for cache, prompt in zip((one, two), prompts, strict=True):
        feed(model, cache, *prompt.values())
    one.join(two)
    mask = torch.ones(2, 13, dtype=torch.long)
    feed(model, one, torch.tensor([[5], [6]]), mask)
    assert len(seen) == 3 and all(set(view.columns) == {POSITION} for view in seen)
    assert NOTED in one.paged[0].segments[0][1].columns()[1]
