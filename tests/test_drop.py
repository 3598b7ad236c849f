"""`Drop`: what a `Keep` without these tokens says; and the lowest scores, found one by one, against the ranking."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.methods.h2o import H2O
from kvfold.methods.scored import Scored
from kvfold.methods.streamingllm import StreamingLLM
from kvfold.scores import drop_from, drop_lowest, keep_top
from kvfold.views import ATTENTION, COLUMN_SUMS
from kvfold.views.decisions import Drop, Keep
from views import random_view, run

SIZE = 12
MANY = settings(max_examples=100)
SCORES = st.integers(0, 3).map(float)
ODD = st.one_of(SCORES, st.sampled_from([torch.inf, -torch.inf, torch.nan]))
FLAGS = st.lists(st.booleans(), min_size=2 * 2 * SIZE, max_size=2 * 2 * SIZE)


def flags(drawn: list[bool]) -> torch.Tensor:
    return torch.tensor(drawn).view(2, 2, SIZE)


def holed(holes: list[bool]):
    """Two rows of two heads; the second row has padding in front, and what `holes` marks is gone."""
    return random_view(B=2, H=2, T=SIZE, left_pad=(0, 4)).apply(Keep(~flags(holes)))


def without(valid: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The slow way."""
    left = valid.clone()
    for row, heads in enumerate(slots.tolist()):
        for head, some in enumerate(heads):
            for slot in some:
                if slot >= 0:
                    left[row, head, slot] = False
    return left


@MANY
@given(
    FLAGS, FLAGS, st.lists(SCORES, min_size=48, max_size=48),
    st.lists(st.integers(-2, 3), min_size=4, max_size=4), st.booleans(),
)  # fmt: skip
def test_the_lowest_are_those_that_are_not_kept(holes, forced, scores, over, free):
    """Ties, padding, holes, heads of which more go than of others, and heads with room."""
    view, scores, always = holed(holes), torch.tensor(scores).view(2, 2, SIZE), None if free else flags(forced)
    count = view.count - torch.tensor(over).view(2, 2)
    columns = {"score": scores}
    found, expected = drop_lowest(view, scores, count, always, columns), keep_top(view, scores, count, always)
    assert torch.equal(view.apply(found).valid, view.apply(expected).valid)
    assert found.columns is columns
    unforced = view.valid if always is None else view.valid & ~always
    most = max(0, *over)
    if (unforced.sum(-1) >= max(1, most)).all():
        assert isinstance(found, Drop) and found.slots.shape == (2, 2, most)
        assert torch.equal((found.slots >= 0).sum(-1), (view.count - count).clamp(min=0))


@MANY
@given(FLAGS, st.lists(ODD, min_size=48, max_size=48), st.lists(st.integers(-1, 9), min_size=4, max_size=4))
def test_scores_that_are_no_numbers_and_many_that_go(holes, scores, over):
    view, scores = holed(holes), torch.tensor(scores).view(2, 2, SIZE)
    count = view.count - torch.tensor(over).view(2, 2)
    found = drop_lowest(view, scores, count)
    assert torch.equal(view.apply(found).valid, view.apply(keep_top(view, scores, count)).valid)
    if max(over) > 3:
        assert isinstance(found, Keep)


def test_what_overflowed_is_the_lowest_and_stays_where_there_is_room():
    view, scores = random_view(T=4), torch.tensor([[[1.0, -torch.inf, 2.0, -torch.inf]]])
    for count, stay in ((2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        found = drop_lowest(view, scores, torch.tensor([[count]]))
        assert view.apply(found).valid[0, 0].nonzero().flatten().tolist() == stay


def test_of_those_that_tie_the_later_goes():
    view = random_view(T=5)
    scores = torch.tensor([[[2.0, 1.0, 1.0, 3.0, 1.0]]])
    slots = [drop_lowest(view, scores, torch.tensor([[5 - n]])).slots[0, 0].tolist() for n in range(4)]
    assert slots == [[], [4], [4, 2], [4, 2, 1]]
    last = torch.tensor([[[False, False, False, False, True]]])
    assert drop_lowest(view, scores, torch.tensor([[4]]), last).slots.tolist() == [[[2]]]


def test_where_all_that_could_go_must_stay_it_is_ranked():
    view, everyone = random_view(T=4), torch.ones(1, 1, 4, dtype=torch.bool)
    found = drop_lowest(view, torch.zeros(1, 1, 4), torch.tensor([[3]]), everyone)
    assert isinstance(found, Keep) and found.mask.tolist() == [[[True, True, True, False]]]


@MANY
@given(FLAGS, st.integers(0, 13), st.lists(st.integers(0, 4), min_size=4, max_size=4))
def test_from_a_place_on(holes, first, number):
    view, number = holed(holes), torch.tensor(number).view(2, 2)
    number = torch.minimum(number, view.count)
    first = torch.minimum(torch.full((2, 2), first), view.count - number)
    kept = view.valid & ((view.rank < first[..., None]) | (view.rank >= (first + number)[..., None]))
    found = drop_from(view, first, number)
    assert torch.equal(view.apply(found).valid, kept) and (found.slots < SIZE).all()
    assert torch.equal(view.apply(drop_from(view, first, number - 5)).valid, view.valid)


@MANY
@given(FLAGS, st.lists(st.integers(-1, SIZE - 1), min_size=12, max_size=12))
def test_a_view_after_it_is_that_after_the_keep(holes, slots):
    view, slots = holed(holes), torch.tensor(slots).view(2, 2, 3)
    columns = {"score": torch.rand(2, 2, SIZE)}
    view.column_sums()
    view.memo[ATTENTION] = torch.zeros(2, 2, 1, SIZE, SIZE)
    dropped, kept = view.apply(Drop(slots, columns)), view.apply(Keep(without(view.valid, slots), columns))
    assert torch.equal(dropped.valid, kept.valid) and torch.equal(dropped.keys, kept.keys)
    assert dropped.columns.keys() == kept.columns.keys() and dropped.columns["score"] is columns["score"]
    assert dropped.changed == kept.changed == {"score"}
    assert dropped.memo.keys() == kept.memo.keys() == {COLUMN_SUMS}
    assert torch.equal(dropped.column_sums(), kept.column_sums())


def test_none_is_not_the_first_nor_the_last():
    view = random_view(T=3)
    for slots, left in (([-1, -1], [0, 1, 2]), ([0, -1], [1, 2]), ([-1, 2], [0, 1]), ([], [0, 1, 2])):
        drop = Drop(torch.tensor(slots, dtype=torch.int64).view(1, 1, -1))
        assert view.apply(drop).valid[0, 0].nonzero()[:, 0].tolist() == left
    assert view.valid.all()  # the view that it was made of is as it was


@dataclass(frozen=True)
class Masked(H2O):
    """H2O that says what stays at every step."""

    after_decode = Scored.after_prefill


@dataclass(frozen=True)
class MaskedStream(StreamingLLM):
    """StreamingLLM that says what stays at every step."""

    after_decode = StreamingLLM.after_prefill


@pytest.mark.parametrize("budget", [6, 0.5, 1.0])
@pytest.mark.parametrize("kinds", [(H2O, Masked), (StreamingLLM, MaskedStream)], ids=["h2o", "streamingllm"])
def test_a_layer_holds_the_same_either_way(kinds, budget):
    view = random_view(B=2, H=2, G=2, T=30, left_pad=(0, 9))
    mask = view.queries.valid
    states = view.queries.states, view.keys, view.values
    (one, steps), (other, again) = (run(kind(budget=budget), *states, [15, *[1] * 15], mask) for kind in kinds)
    assert one.kept() == other.kept() and one.counts().max() == {6: 6, 0.5: 8, 1.0: 30}[budget]
    assert all(torch.equal(x, y) for x, y in zip(steps[1:], again[1:], strict=True))
