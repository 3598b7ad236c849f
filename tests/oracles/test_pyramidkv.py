"""PyramidKV against its card: a line over the layers, exact in its sum, over any score."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.budgets.allocate import allocate
from kvfold.methods.pyramidkv import PyramidKV, pyramid
from kvfold.methods.snapkv import SnapKV
from kvfold.views import LayerView
from views import full_probabilities, kept, random_view, spared, top

OWN = "snapkv(window=4, kernel=3)"


def official(mean: int, window: int, length: int, layers: int, beta: int) -> list[int]:
    """The card's steps 1 to 4 in integers: what a layer keeps besides the window."""
    rest = mean - window
    if length < 2 * rest:
        return [rest] * layers
    low = rest // beta
    high = 2 * rest - low
    if high >= length - window:
        high = length - window
        low = 2 * rest - high
    step = (high - low) // (layers - 1)
    return [high - layer * step for layer in range(layers)]


def at(view: LayerView, ordinal: int, layers: int) -> LayerView:
    """The view as that of one of several layers."""
    return replace(view, place=replace(view.place, ordinal=ordinal, paged=tuple(range(layers)), step={}))


def test_oracle_1_the_line_without_its_steps():
    theirs, ours = official(128, 8, 4000, 32, 20), pyramid(128.0, 8, 4000, 32, 20.0)
    assert (theirs[0], theirs[31], sum(theirs)) == (234, 17, 4016)
    assert (ours[0], ours[31]) == (8 + 234, pytest.approx(8 + 6)) and sum(ours) == pytest.approx(32 * 128)


def test_oracle_2_short_prompts():
    assert (official(128, 8, 241, 32, 20)[0], official(128, 8, 241, 32, 20)[31]) == (233, 16)
    ours = pyramid(128.0, 8, 241, 32, 20.0)
    assert (ours[0], ours[31]) == (pytest.approx(8 + 233), pytest.approx(8 + 7))
    assert official(128, 8, 239, 32, 20) == [120] * 32 and set(pyramid(128.0, 8, 239, 32, 20.0)) == {1.0}


def test_oracle_3_without_steepness_it_is_what_it_wraps():
    view = random_view(B=2, H=2, G=2, T=40, left_pad=(0, 9))
    for ordinal in range(3):
        there = at(view, ordinal, 3)
        wrapped = SnapKV(budget=9, window=4, kernel=3)
        assert kept(PyramidKV(budget=9, beta=1.0, score=OWN), there) == kept(wrapped, there)


@given(st.floats(1, 300), st.integers(0, 40), st.integers(1, 1000), st.integers(1, 40), st.floats(1, 50))
def test_oracle_4_a_falling_line_within_its_bounds(mean, window, length, layers, beta):
    mean = min(mean, float(length))
    found = pyramid(mean, window, length, layers, beta)
    if set(found) != {1.0}:
        rest = mean - window
        assert list(found) == sorted(found, reverse=True) and sum(found) == pytest.approx(layers * mean)
        assert window + rest / beta - 1e-6 <= found[-1] and found[0] <= length + 1e-6


def test_oracle_5_one_layer():
    assert pyramid(128.0, 8, 4000, 1, 20.0) == (128,)
    view = random_view(H=2, T=40)
    assert kept(PyramidKV(budget=9, score=OWN), view) == kept(SnapKV(budget=9, window=4, kernel=3), view)


@pytest.mark.parametrize("budget", [40, 50, 1.0])
def test_oracle_6_nothing_goes_when_there_is_room(budget):
    view = random_view(H=2, T=40)
    assert kept(PyramidKV(budget=budget), at(view, 2, 3)) == [[list(range(40))] * 2]


def slow(view: LayerView, row: int, head: int, count: int) -> list[int]:
    """The card's step 5 for one KV head, with a window of 4 and mean pooling over 3."""
    group = view.queries.states.shape[1] // view.heads
    probs = full_probabilities(view, row)[head * group : (head + 1) * group]
    total = probs.shape[-1]
    votes = [float(probs[:, -4:, j].sum(1).mean()) for j in range(total - 4)]
    pooled = [sum(votes[max(0, j - 1) : j + 2]) / 3 for j in range(total - 4)]
    return spared(total, count, 4) if count < 6 else [*top(pooled, count - 4), *range(total - 4, total)]


@pytest.mark.parametrize("budget", [10, 0.25])
def test_against_a_loop(budget):
    view = random_view(B=2, H=2, G=2, T=60, D=16, left_pad=(0, 12), seed=3)
    held = [0, 0]
    for ordinal in range(4):
        left = kept(PyramidKV(budget=budget, beta=5.0, score=OWN), at(view, ordinal, 4))
        for row, length in enumerate((60, 48)):
            mean = 10 if budget == 10 else budget * length
            low = (mean - 4) / 5
            high = min(2 * (mean - 4) - low, length - 4)
            low = 2 * (mean - 4) - high
            weights = tuple(4 + high - (high - low) * layer / 3 for layer in range(4))
            counts = allocate(budget, length, length, 4, 2, weights)[ordinal]
            for head in range(2):
                assert abs(counts[head] - weights[ordinal]) < 1
                assert left[row][head] == slow(view, row, head, counts[head])
                held[row] += counts[head]
    assert held == ([80, 80] if budget == 10 else [120, 96])


def test_other_scores():
    view = random_view(H=2, G=2, T=60)
    sizes = [len(kept(PyramidKV(budget=12, score="h2o"), at(view, i, 3))[0][0]) for i in range(3)]
    assert sizes[0] > sizes[1] > sizes[2] and sum(sizes) == 36
    assert PyramidKV(score="h2o").listens("after_decode") and not PyramidKV().listens("after_decode")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "beta=0.5"),
        ({"budget": 0}, "budget=0"),
        ({"score": "streamingllm"}, "score='streamingllm'"),
        ({"score": "snapkv(budget=3)"}, "leave the budget to PyramidKV"),
        ({"score": "adakv"}, "score='adakv' shares the budget by itself, which pyramidkv would not heed: .*kernel=7"),
        ({"score": "pyramidkv"}, "score='pyramidkv' shares the budget by itself"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PyramidKV(**options)
