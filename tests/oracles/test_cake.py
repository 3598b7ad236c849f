"""CAKE against its card: preferences of layers, a cascade that loses nothing, and one token out for each that comes."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.budgets.allocate import allocate, round_shares
from kvfold.budgets.layers import share_out
from kvfold.methods.cake import CAKE
from kvfold.methods.snapkv import SnapKV
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from stack import Stack
from views import asked_view, full_probabilities, kept, random_view, row_of, step_view, top


def looked(rows: list[list[float]]) -> LayerView:
    """The last queries give `rows` to the tokens before them, and the rest to themselves."""
    window, prefix = len(rows), len(rows[0])
    weights = torch.full((window, prefix + window), 1e-30)
    for i, row in enumerate(rows):
        weights[i, :prefix] = torch.tensor(row).clamp(min=1e-30)
        weights[i, prefix + i] = max(1e-30, 1 - sum(row))
    return asked_view(weights.log()[None, None, None], window)


def random_layers(count: int, seed: int = 0, **options: object) -> list[LayerView]:
    return [random_view(seed=seed + 10 * i, **options) for i in range(count)]  # type: ignore[arg-type]


def test_oracle_1_entropy_variance_and_indicator():
    view = looked([[0.5, 0.3], [0.2, 0.6]])
    scores, preference = CAKE(window=2, kernel=1).measure(view)
    assert preference.item() == pytest.approx(1.3361 * 0.09, rel=1e-3)
    assert scores[0, 0].tolist() == pytest.approx([9.35, 9.45, 0, 0], abs=1e-4)
    assert CAKE(window=2, gamma=0.0, kernel=1).measure(view)[0][0, 0].tolist() == pytest.approx([0.35, 0.45, 0, 0])
    tuned = CAKE(window=2, tau1=2.0, tau2=0.5).measure(view)[1]
    assert tuned.item() == pytest.approx(1.3361**0.5 * 0.09**2, rel=1e-3)


def test_oracle_2_what_a_layer_can_not_hold_goes_to_the_others():
    """In proportion, so that the total of the third, which the official code loses, is kept."""
    first = share_out(torch.tensor([600.0, 250, 150]).numpy(), 1000.0, torch.full((3,), 400.0).double().numpy())
    assert round_shares(first, 400).tolist() == [400, 375, 225]  # officially 350, 250
    second = share_out(torch.tensor([333.3, 333.3, 333.4]).numpy(), 1000.0, torch.full((3,), 900.0).double().numpy())
    assert sorted(round_shares(second, 900).tolist()) == [333, 333, 334]
    third = share_out(torch.tensor([900.0, 60, 40]).numpy(), 1000.0, torch.full((3,), 300.0).double().numpy())
    assert third.tolist() == [300, 300, 300]


@given(st.lists(st.floats(0, 9), min_size=2, max_size=6), st.floats(1, 60), st.integers(0, 30))
def test_with_more_sharers_nobody_gets_more(weights, total, cap):
    caps = torch.full((len(weights),), float(cap)).double().numpy()
    all_of_them = share_out(torch.tensor(weights).numpy(), total, caps)
    without = share_out(torch.tensor(weights[:-1]).numpy(), total, caps[:-1])
    assert all_of_them.sum() == pytest.approx(min(total, cap * len(weights)))
    if sum(weights[:-1]):
        assert (all_of_them[:-1] <= without + 1e-6).all()


class AtTheEnd(CAKE):
    """Without the cascade: shares are worked out once, after the last layer."""

    def due(self, ordinal: int, layers: int) -> bool:
        return False


@pytest.mark.parametrize("budget", [0.3, 9, 17, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_oracle_3_the_cascade_loses_nothing(budget, seed):
    views = random_layers(5, seed, B=2, H=2, G=2, T=50, D=16, left_pad=(0, 13))
    options = {"budget": budget, "window": 4}
    cascade, once = Stack(CAKE(**options), views), Stack(AtTheEnd(**options), views)
    assert cascade.kept() == once.kept()
    for stage in cascade.stages[:-1]:  # and never holds more than the whole budget and the newest layer
        for row, length in enumerate((50, 37)):
            each = budget if isinstance(budget, int) else budget * length
            held = sum(len(head) for layer in stage for head in layer[row])
            assert held <= 5 * 2 * each + 2 * length
    assert len(once.stages[2][0][0][0]) == 50
    assert budget == 0.8 or any(len(head) < 50 for layer in cascade.stages[2] for head in layer[0])


class Counted(Stack):
    """How many layers were written anew, and how many tokens there were at most."""

    rewrites = 0

    def _decide(self, view, decisions):
        self.rewrites += 1
        return Stack._decide(view, decisions)


@pytest.mark.parametrize("budget", [6, 12, 0.25])
def test_layers_are_cut_when_they_hold_more_than_the_paper_does(budget):
    """The paper cuts every layer after each: 24 * 25 / 2 times, and holds the budget and the newest layer whole."""
    views = [random_view(B=2, H=2, G=2, T=60, D=16, left_pad=(0, 9), seed=i) for i in range(24)]
    stack = Counted(CAKE(budget=budget, window=4), views)
    most = [max(sum(max(map(len, layer[row])) for layer in stage) for stage in stack.stages) for row in range(2)]
    for row, length in enumerate((60, 51)):
        each = budget if isinstance(budget, int) else budget * length
        assert most[row] <= each * 24 + length
    assert stack.rewrites - 24 <= 24 * 25 // 2 * (1 / 4 if budget == 6 else 1 / 2)


def test_oracle_4_without_variance_in_the_score_it_is_snapkv_of_equal_layers():
    view = random_view(B=2, H=2, G=2, T=40, D=16, left_pad=(0, 6))
    left = Stack(CAKE(budget=14, gamma=0.0, window=6), [view] * 3).kept()
    assert left == [kept(SnapKV(budget=14, window=6, kernel=5), view)] * 3


def test_oracle_5_a_layer_that_looks_alike_keeps_its_window():
    still, lively = looked([[0.4, 0.2, 0.1, 0.1]] * 2), looked([[0.4, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.4]])
    sizes = Stack(CAKE(budget=4, window=2), [lively, still, lively]).sizes()
    assert sizes == [[[5]], [[2]], [[5]]]
    assert Stack(CAKE(budget=4, window=2), [still] * 3).sizes() == [[[4]]] * 3  # 0/0


@pytest.mark.parametrize("budget", [1.0, 40, 60])
def test_oracle_6_nothing_goes_when_there_is_room(budget):
    views = random_layers(3, B=2, H=2, T=40, left_pad=(0, 5))
    assert Stack(CAKE(budget=budget), views).kept() == [[[list(range(40))] * 2, [list(range(35))] * 2]] * 3


def slow(views: list[LayerView], row: int, budget: int, window: int, gamma: float) -> list[list[list[int]]]:
    """The card, steps 1 to 6 at the last layer, for one row without its padding."""
    preferences, scores = [], []
    for view in views:
        heads, probs = view.heads, full_probabilities(view, row)
        total = probs.shape[-1]
        seen = probs[:, -window:, : total - window].tolist()
        spread, shift, found = 0.0, 0.0, []
        for head in seen:
            found.append([])
            for j in range(total - window):
                column = [query[j] for query in head]
                mean = sum(column) / window
                variance = sum((x - mean) ** 2 for x in column) / (window - 1)
                spread -= sum(x * log(x + 1e-10) for x in column)
                shift += variance
                found[-1].append(mean + gamma * variance)
        smoothed = [[sum(line[max(0, j - 2) : j + 3]) / 5 for j in range(len(line))] for line in found]
        group = len(smoothed) // heads
        members = [smoothed[h * group : (h + 1) * group] for h in range(heads)]
        scores.append([[sum(column) / group for column in zip(*group_of, strict=True)] for group_of in members])
        preferences.append(spread * shift)
    free = (budget - window) * len(views)
    weights = tuple(window + p / sum(preferences) * free for p in preferences)
    assert max(weights) < total  # the cap is tested by itself
    counts = allocate(budget, total, total, len(views), heads, weights)
    tail = list(range(total - window, total))
    return [
        [[*top(scores[i][h], counts[i][h] - window), *tail] for h in range(views[0].heads)] for i in range(len(views))
    ]


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed):
    views = random_layers(4, seed, B=2, H=2, G=2, T=44, D=16, left_pad=(0, 7))
    left = Stack(CAKE(budget=15, window=5), views).kept()
    for row in range(2):
        assert [layer[row] for layer in left] == slow(views, row, 15, 5, 200.0)


def test_row_alone():
    views = random_layers(3, B=2, H=2, G=2, T=30, left_pad=(0, 27))  # fewer queries than the window in one row
    both = Stack(CAKE(budget=0.5, window=8), views).kept()
    for row in range(2):
        alone = Stack(CAKE(budget=0.5, window=8), [row_of(view, row) for view in views]).kept()
        assert [layer[row] for layer in both] == [layer[0] for layer in alone]


def test_in_decoding_the_newest_query_drops_one():
    view = random_view(T=12)
    method = CAKE(budget=6, window=2, kernel=3)
    held = Keep(torch.tensor([[[0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]]]).bool())
    # Means of three without the window of two: .2, .27, .2, .17 and .1
    step = step_view(view, held, torch.tensor([[0.2, 0.4, 0.2, 0.01, 0.3, 0.2, 0.1]]).log())
    assert kept(method, step, "after_decode") == [[[1, 3, 4, 5, 11, 12]]]
    step = step_view(view, held, torch.tensor([[0.2, 0.1, 0.2, 0.4, 0.3, 0.2, 0.1]]).log())
    assert kept(method, step, "after_decode") == [[[3, 4, 5, 10, 11, 12]]]  # .1 .17 .23 .3 .23


def test_what_decoding_needs_is_put_in_place_once_for_all_layers():
    step: dict = {}
    views = [random_view(B=2, T=12, left_pad=(0, 7), ordinal=i, paged=(0, 1), step=step) for i in range(2)]
    method = CAKE(budget=8)
    first = method.short(views[0])
    assert first.tolist() == [[False], [True]] and method.short(views[1]) is first
    assert CAKE(budget=20).short(views[1]).tolist() == [[True], [True]]


def test_in_decoding_a_short_text_grows_until_it_fills_the_budget():
    view = random_view(T=5)
    step = step_view(view, Keep(view.valid), torch.zeros(1, 6))
    assert kept(CAKE(budget=6, window=2), step, "after_decode") == [[[0, 1, 2, 3, 4, 5]]]
    assert len(kept(CAKE(budget=5, window=2), step, "after_decode")[0][0]) == 5
    assert len(kept(CAKE(budget=1.0), step, "after_decode")[0][0]) == 6


@pytest.mark.parametrize("options", [{"window": 0}, {"gamma": -1.0}, {"tau1": 0.0}, {"tau2": 0.0}, {"kernel": 2}])
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        CAKE(**options)
