"""DynamicKV against its card: one top-k over all layers shares the budget, every few layers anew."""

import pytest
import torch

from kvfold.budgets.allocate import allocate
from kvfold.methods.dynamickv import DynamicKV
from kvfold.views import LayerView
from stack import Stack
from views import asked_view, full_probabilities, random_view, row_of, top

LAYERS_1 = [[[0.9, 0.8, 0.7, 0.6]], [[0.5, 0.1, 0.1, 0.1]]]
LAYERS_2 = [[[0.9, 0.8, 0.1, 0.05], [0.7, 0.6, 0.02, 0.01]], [[0.5, 0.3, 0.2, 0.04], [0.4, 0.35, 0.25, 0.03]]]
SMALL = {"budget": 3, "window": 1, "kernel": 1}


def voted(heads: list[list[float]], scale: float = 4.0) -> LayerView:
    """A layer whose one query gives `heads[h]` / `scale` to the tokens before its own, and itself the rest."""
    share = torch.tensor(heads) / scale
    return asked_view(torch.cat([share, 1 - share.sum(-1, keepdim=True)], -1).log()[None, :, None, None], 1)


def test_oracle_1_all_that_is_best_may_lie_in_one_layer():
    stack = Stack(DynamicKV(**SMALL), [voted(heads) for heads in LAYERS_1])
    assert stack.kept() == [[[[0, 1, 2, 3, 4]]], [[[4]]]]


def test_oracle_2_shares_are_those_of_layers_not_of_heads():
    stack = Stack(DynamicKV(**SMALL), [voted(heads) for heads in LAYERS_2])
    assert stack.kept() == [[[[0, 1, 4]] * 2]] * 2


@pytest.mark.parametrize(("budget", "refresh"), [(9, 1), (12, 2), (0.4, 4), (0.9, 3)])
@pytest.mark.parametrize("seed", range(2))
def test_oracles_3_and_4_the_sum_is_exact_and_no_layer_grows(budget, refresh, seed):
    views = [random_view(B=2, H=2, G=2, T=40, D=16, left_pad=(0, 9), seed=seed + 7 * i) for i in range(6)]
    stack = Stack(DynamicKV(budget=budget, window=4, refresh=refresh, buffer=4.0), views)
    for row, length in enumerate((40, 31)):
        each = budget if isinstance(budget, int) else budget * length
        assert sum(sum(layer[row]) for layer in stack.sizes()) == int(each * 12 + 1e-6)
        for last, stage in enumerate(stack.stages):
            due, held = last % refresh == refresh - 1 or last == 5, [sum(map(len, layer[row])) for layer in stage]
            assert not due or sum(held) <= each * 12 + len(held)  # of a share, each layer may round up
            if last and not due:
                assert stage[:-1] == stack.stages[last - 1]


@pytest.mark.parametrize("budget", [1.0, 40, 44])
def test_oracle_3_nothing_goes_when_there_is_room(budget):
    views = [random_view(H=2, T=40, seed=i) for i in range(3)]
    assert Stack(DynamicKV(budget=budget), views).kept() == [[[list(range(40))] * 2]] * 3


def test_oracle_5_scores_of_layers_compete_as_they_are():
    quiet = [[x / 10 for x in head] for head in LAYERS_1[0]]
    stack = Stack(DynamicKV(**SMALL), [voted(quiet), voted([[0.5, 0.4, 0.3, 0.2]])])
    assert stack.sizes() == [[[1]], [[5]]]


def test_a_layer_holds_a_buffer_and_is_cut_at_the_refresh():
    views = [random_view(H=2, T=60, seed=i) for i in range(5)]
    stack = Stack(DynamicKV(budget=8, window=4, buffer=3.0, refresh=2), views)
    sizes = [[len(layer[0][0]) for layer in stage] for stage in stack.stages]
    assert sizes[0] == [4 + 3 * 4] and sizes[2][2] == 16
    assert sum(sizes[1]) <= 2 * 4 + 5 * 4 + 2 and sum(sizes[3]) <= 4 * 4 + 5 * 4 + 4
    assert sum(sizes[4]) == 5 * 8


def slow(views: list[LayerView], row: int, budget: int, window: int, kernel: int) -> list[list[list[int]]]:
    """The card for one row without its padding and with one refresh, after the last layer."""
    heads, layers = views[0].heads, len(views)
    scores = []
    for view in views:
        probs = full_probabilities(view, row)
        total, group = probs.shape[-1], probs.shape[0] // heads
        scores.append([])
        for head in range(heads):
            votes = probs[head * group : (head + 1) * group, -window:, : total - window].sum(1).mean(0).tolist()
            half = kernel // 2
            scores[-1].append([sum(votes[max(0, j - half) : j + half + 1]) / kernel for j in range(len(votes))])
    everything = [(-s, i, h, j) for i in range(layers) for h in range(heads) for j, s in enumerate(scores[i][h])]
    best = sorted(everything)[: (budget - window) * heads * layers]
    own = [sum(i == layer for _, i, _, _ in best) for layer in range(layers)]
    weights = tuple(window + (budget - window) * layers * n / len(best) for n in own)
    assert max(weights) <= total
    counts = allocate(budget, total, total, layers, heads, weights)
    tail = list(range(total - window, total))
    return [[[*top(scores[i][h], counts[i][h] - window), *tail] for h in range(heads)] for i in range(layers)]


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed):
    views = [random_view(B=2, H=2, G=2, T=45, D=16, left_pad=(0, 8), seed=seed + 5 * i) for i in range(4)]
    left = Stack(DynamicKV(budget=13, window=5, kernel=3), views).kept()
    for row in range(2):
        assert [layer[row] for layer in left] == slow(views, row, 13, 5, 3)


def test_row_alone():
    views = [random_view(B=2, H=2, T=30, left_pad=(0, 25), seed=i) for i in range(5)]
    both = Stack(DynamicKV(budget=0.5), views).kept()
    for row in range(2):
        alone = Stack(DynamicKV(budget=0.5), [row_of(view, row) for view in views]).kept()
        assert [layer[row] for layer in both] == [layer[0] for layer in alone]


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"kernel": 4}, {"pool": "sum"}, {"buffer": 0.5}, {"refresh": 0}, {"budget": 0}]
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        DynamicKV(**options)
