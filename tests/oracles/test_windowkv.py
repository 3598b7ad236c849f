"""WindowKV against its card: whole runs by task, one choice for a group of layers, budgets along a line."""

from dataclasses import replace

import pytest
import torch

from kvfold.methods.windowkv import WindowKV, layer_shares
from kvfold.views import LayerView
from stack import Stack
from views import asked_view, full_probabilities, kept, random_view, row_of

MASS = [0.1, 0.1, 0.9, 0.0, 0.3, 0.3, 0.2, 0.2]


def seen(mass: list[float], suffix: int = 2) -> LayerView:
    """The last `suffix` queries give `mass` (in units of a quarter) to the tokens before them."""
    share = torch.tensor(mass) / 4 / suffix
    weights = torch.full((suffix, len(mass) + suffix), 1e-30)
    for i in range(suffix):
        weights[i, : len(mass)] = share.clamp(min=1e-30)
        weights[i, len(mass) + i] = 1 - share.sum()
    return asked_view(weights.log()[None, None, None], suffix)


@pytest.mark.parametrize(
    ("layers", "group", "mean", "official"),
    [
        (32, 8, 2048, [2926, 2341, 1756, 1170]),
        (32, 8, 1024, [1463, 1171, 879, 585]),
        (32, 8, 512, [732, 586, 440, 292]),
        (28, 7, 2048, [3072, 2390, 1708, 1024]),
    ],
)
def test_oracle_1_budgets_of_groups(layers, group, mean, official):
    shares = layer_shares(float(mean + 32), 32, layers, group, 14.0)
    assert sum(shares) == pytest.approx(layers * (mean + 32))
    for i in range(4):
        assert len(set(shares[i * group : (i + 1) * group])) == 1
        assert shares[i * group] - 32 == pytest.approx(official[i], abs=2)


def test_oracle_2_runs_by_their_mean():
    method = {"task": "aggregation", "suffix": 2, "run": 2}
    assert kept(WindowKV(budget=6, **method), seen(MASS)) == [[[2, 3, 4, 5, 8, 9]]]
    # b = 5 is two runs as well; the token that is left over lengthens the suffix.
    assert kept(WindowKV(budget=7, **method), seen(MASS)) == [[[2, 3, 4, 5, 7, 8, 9]]]


def test_oracle_3_the_task_says_what_makes_a_run_important():
    view = seen([0.5, 0.5, 0.9, 0.0])
    assert kept(WindowKV(budget=4, task="aggregation", suffix=2, run=2), view) == [[[0, 1, 4, 5]]]
    assert kept(WindowKV(budget=4, task="localization", suffix=2, run=2), view) == [[[2, 3, 4, 5]]]
    assert WindowKV(task="aggregation").observed == 16 and WindowKV().observed == 32


@pytest.mark.parametrize("task", ["localization", "aggregation"])
def test_oracles_4_and_5_layers_of_a_group_hold_the_same_runs(task):
    views = [random_view(H=2, G=2, T=70, D=16, seed=i) for i in range(5)]
    method = WindowKV(budget=30, task=task, suffix=6, run=4, group=2, beta=4.0)
    for first, layer in enumerate(Stack(method, views).kept()):
        heads = layer[0]
        assert heads[0][-6:] == list(range(64, 70))
        for other in (heads[1], *Stack(method, views).kept()[first // 2 * 2][0]):
            one, two = ({p // 4 for p in held if p < 60} for held in (heads[0], other))
            assert len(one ^ two) == 0
        whole = [run for run in range(15) if sum(p // 4 == run for p in heads[0]) == 4]
        assert 4 * len(whole) + 6 <= len(heads[0]) < 4 * len(whole) + 6 + 2 * 4


def slow(view: LayerView, row: int, budget: int, task: str, suffix: int, run: int) -> list[int]:
    """The card's steps 3 to 7 for one row without its padding."""
    probs = full_probabilities(view, row)
    total = probs.shape[-1]
    mass = probs[:, -suffix:, : total - suffix].sum(1).tolist()
    room, reviewed = budget - suffix, total - suffix
    runs = [range(start, min(start + run, reviewed)) for start in range(0, reviewed, run)]
    scores = []
    for window in runs:
        best = run // 2 if task == "localization" else run
        found = [sorted((head[j] for j in window), reverse=True)[:best] for head in mass]
        scores.append(sum(sum(values) / len(values) for values in found) / len(found))
    chosen: list[int] = []
    for i in sorted(range(len(runs)), key=lambda i: -scores[i]):
        if len(chosen) + len(runs[i]) > room:
            break
        chosen += runs[i]
    rest = [j for j in reversed(range(reviewed)) if j not in chosen][: room - len(chosen)]
    return sorted([*chosen, *rest, *range(total - suffix, total)])


@pytest.mark.parametrize("task", ["localization", "aggregation"])
@pytest.mark.parametrize(("budget", "suffix", "run"), [(20, 4, 4), (17, 5, 6), (30, 8, 3), (38, 2, 5)])
def test_against_a_loop(task, budget, suffix, run):
    view = random_view(B=2, H=2, G=3, T=51, D=16, left_pad=(0, 8), seed=budget)
    method = WindowKV(budget=budget, task=task, suffix=suffix, run=run)
    left = kept(method, view)
    for row in range(2):
        assert left[row] == [slow(view, row, budget, task, suffix, run)] * 2
        again = replace(view, place=replace(view.place, step={}))
        assert kept(method, row_of(again, row))[0] == left[row]


@pytest.mark.parametrize("budget", [1.0, 40, 41])
def test_nothing_goes_when_there_is_room(budget):
    view = random_view(B=2, H=2, T=40, left_pad=(0, 7))
    assert kept(WindowKV(budget=budget), view) == [[list(range(40))] * 2, [list(range(33))] * 2]


@pytest.mark.parametrize(("layers", "group"), [(1, 8), (3, 8), (5, 2), (9, 4), (20, 20)])
def test_the_budget_is_the_budget(layers, group):
    views = [random_view(H=2, T=64, seed=i) for i in range(layers)]
    sizes = Stack(WindowKV(budget=0.3, suffix=5, run=4, group=group), views).sizes()
    assert sum(sum(layer[0]) for layer in sizes) == int(0.3 * 64 * 2 * layers)


@pytest.mark.parametrize(
    "options", [{"task": "qa"}, {"run": 0}, {"suffix": 0}, {"group": 0}, {"beta": 0.5}, {"budget": 0}]
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        WindowKV(**options)
