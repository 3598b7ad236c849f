"""PrefixKV against its card: one share of attention for all layers, exactly as much as the budget holds."""

from itertools import pairwise

import pytest
import torch

from kvfold.budgets.allocate import allocate
from kvfold.formats import LOG_MASS
from kvfold.methods.prefixkv import PrefixKV
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from stack import Stack
from views import asked_view, full_probabilities, kept, random_view, row_of, step_view, top

A, B = [8.0, 1, 1, 0], [3.0, 3, 2, 2]


def counts(layers: list[list[float]], total: int) -> list[int]:
    """o_l at the threshold that keeps `total` tokens of layers with this importance."""
    method, signals = PrefixKV(sinks=0), []
    for importance in layers:
        # A last query that looks so at all tokens but its own; the others see only what does not count.
        view = asked_view(torch.zeros(1, 1, 1, 1, len(importance)), 1)
        view.memo["column_sums"] = torch.tensor(importance)[None, None]
        signals.append(method.measure(view)[1])
    free = torch.tensor([total / len(layers)], dtype=torch.float64)
    found: list[int] = method.weights(signals, free, len(layers))[0].tolist()
    return found


def test_oracle_1_a_concentrated_layer_needs_less():
    assert counts([A, B], 4) == [1, 3]
    assert counts([A, B], 6) == [2, 4]


def test_oracle_2_the_scale_of_a_layer_does_not_matter():
    for total in range(1, 9):
        assert counts([A, B], total) == counts([[100 * x for x in A], B], total)


def test_oracle_3_equal_one_hot_and_uniform_layers():
    assert counts([B, B], 4) == [2, 2]
    assert counts([[1.0] * 10, [5.0] + [0.0] * 9], 8) == [7, 1]


def test_oracle_4_thresholds_are_monotone():
    rng = torch.Generator().manual_seed(0)
    layers = [(torch.rand(12, generator=rng) ** power).tolist() for power in (1, 4, 9)]
    found = [counts(layers, total) for total in range(37)]
    assert all(sum(one) == total for total, one in enumerate(found))
    assert all(a <= b for before, after in pairwise(found) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("budget", [1.0, 30, 31])
def test_oracle_4_the_whole_budget_keeps_everything(budget):
    views = [random_view(B=2, H=2, T=30, seed=i, left_pad=(0, 4)) for i in range(3)]
    assert Stack(PrefixKV(budget=budget), views).kept() == [[[list(range(30))] * 2, [list(range(26))] * 2]] * 3


def slow(views: list[LayerView], row: int, budget: int, sinks: int) -> list[list[list[int]]]:
    """The card for one row: importance, Lorenz curves and the highest threshold that the budget allows."""
    heads, curves, ranks = views[0].heads, [], []
    for view in views:
        importance = full_probabilities(view, row).sum(1).mean(0).double()
        ranks.append(importance.tolist())
        ordered = importance.sort(descending=True).values
        curves.append((ordered.cumsum(0) / ordered.sum()).tolist())
    length, layers = len(ranks[0]), len(views)

    def needed(p: float) -> list[int]:
        return [next((o + 1 for o, share in enumerate(curve) if share >= p), length) for curve in curves]

    total = (budget - sinks - 1) * layers
    thresholds = sorted(share for curve in curves for share in curve)
    own = max((needed(p) for p in thresholds if sum(needed(p)) <= total), key=sum)
    assert sum(own) == total and max(own) + sinks + 1 <= length
    weights = tuple(float(sinks + 1 + n) for n in own)
    found = allocate(budget, length, length, layers, heads, weights)
    fixed = {*range(sinks), length - 1}
    kept_here = []
    for layer in range(layers):
        scores = [float("inf") if j in fixed else x for j, x in enumerate(ranks[layer])]
        kept_here.append([top(scores, found[layer][head]) for head in range(heads)])
    return kept_here


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed, sinks):
    views = [random_view(B=2, H=2, G=2, T=41, D=16, left_pad=(0, 6), seed=seed + 5 * i) for i in range(4)]
    left = Stack(PrefixKV(budget=12, sinks=sinks), views).kept()
    for row in range(2):
        assert [layer[row] for layer in left] == slow(views, row, 12, sinks)


def test_heads_of_a_layer_keep_the_same():
    views = [random_view(H=3, G=2, T=40, seed=i) for i in range(3)]
    for layer in Stack(PrefixKV(budget=10), views).kept():
        assert layer[0][0] == layer[0][1] == layer[0][2]
    for layer in Stack(PrefixKV(budget=0.26), views).kept():  # 10.4 a head: the first heads of a layer keep one more
        assert set(layer[0][2]) <= set(layer[0][1]) <= set(layer[0][0]) and len(layer[0][0]) - len(layer[0][2]) <= 1


def test_chunks_add_up():
    """Importance is the sum over all queries, those of earlier passes too."""
    view = random_view(H=2, G=2, T=30)
    method = PrefixKV(budget=29)
    before = view.column_sums()[..., :20].clone()
    half = random_view(H=2, G=2, T=30)
    half = half.apply(Keep(half.valid, {"prefixkv_score": torch.nn.functional.pad(before, (0, 10))}))
    assert torch.allclose(method.scores(half)[0, 0, :20], (view.column_sums()[..., :20] + before).mean(1)[0])


def test_row_alone():
    views = [random_view(B=2, H=2, T=30, left_pad=(0, 25), seed=i) for i in range(4)]
    both = Stack(PrefixKV(budget=0.5), views).kept()
    for row in range(2):
        alone = Stack(PrefixKV(budget=0.5), [row_of(view, row) for view in views]).kept()
        assert [layer[row] for layer in both] == [layer[0] for layer in alone]


@pytest.mark.parametrize(("held", "distance", "gone"), [(10, 3, 7), (10, 10, 5), (2, 25, 1), (1, 25, 0)])
def test_oracle_5_in_decoding_one_goes_at_a_fixed_place(held, distance, gone):
    view = random_view(T=20)
    mask = (torch.arange(20) >= 20 - held).expand(1, 1, 20)
    step = step_view(view, Keep(mask), torch.zeros(1, held + 1))
    everything = [*range(20 - held, 20), 20]
    (row,) = kept(PrefixKV(budget=10, distance=distance), step, "after_decode")
    assert row == [[p for i, p in enumerate(everything) if i != gone]]
    assert row[0][-1] == 20 and (held == 1 or row[0][0] == everything[0])


def test_what_decoding_needs_is_put_in_place_once_for_all_layers():
    step: dict = {}
    views = [random_view(B=2, T=12, left_pad=(0, 7), ordinal=i, paged=(0, 1), step=step) for i in range(2)]
    method = PrefixKV(budget=8)
    first = method.short(views[0])
    assert first.tolist() == [[False], [True]] and method.short(views[1]) is first
    assert PrefixKV(budget=20).short(views[1]).tolist() == [[True], [True]]


def test_in_decoding_a_short_text_grows_until_it_fills_the_budget():
    view = random_view(T=5)
    step = step_view(view, Keep(view.valid), torch.zeros(1, 6))
    assert kept(PrefixKV(budget=6), step, "after_decode") == [[[0, 1, 2, 3, 4, 5]]]
    assert kept(PrefixKV(budget=5), step, "after_decode") == [[[0, 1, 3, 4, 5]]]


def members(k: torch.Tensor, anchors: list[int]) -> list[torch.Tensor]:
    """The mean of each anchor's bucket: itself and, but for both ends, what is next to it, ties to the earlier."""
    near = [t if t in anchors else min(anchors[1:-1], key=lambda c: (abs(t - c), c)) for t in range(len(k))]
    return [k[[t for t, c in enumerate(near) if c == anchor]].mean(0) for anchor in anchors]


def test_buckets_of_a_single_layer_are_means():
    view = random_view(B=2, H=2, G=2, T=30, left_pad=(0, 7), seed=2)
    plain, merged = Stack(PrefixKV(budget=9), [view]), Stack(PrefixKV(budget=9, merge="bucket"), [view])
    assert merged.kept() == plain.kept() and torch.equal(plain.done[0].keys, view.keys)
    for row in range(2):
        alone, left = row_of(view, row), merged.done[0]
        for head in range(2):
            for got, states in ((left.keys, alone.keys), (left.values, alone.values)):
                expected = members(states[0, head], merged.kept()[0][row][head])
                torch.testing.assert_close(got[row, head][left.valid[row, head]], torch.stack(expected))


def test_buckets_of_several_cuts_count_every_token_once():
    views = [random_view(H=2, G=2, T=40, seed=i) for i in range(4)]
    merged = Stack(PrefixKV(budget=8, merge="bucket", mass="counted"), views)
    assert merged.kept() == Stack(PrefixKV(budget=8), views).kept()
    for view, stack in zip(views, merged.done, strict=True):
        many = stack.columns[LOG_MASS].exp().masked_fill(~stack.valid, 0.0)
        torch.testing.assert_close(many.sum(-1), torch.full((1, 2), 40.0))
        for states, whole in ((stack.keys, view.keys), (stack.values, view.values)):
            torch.testing.assert_close((states * many[..., None]).sum(2), whole.sum(2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"sinks": -1}, {"distance": 0}, {"budget": 0}, {"merge": "nearest"}, {"mass": "paper"}]
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        PrefixKV(**options)
