"""D2O against its card: layer budgets, merge weights, the moving threshold, and a loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kvfold.budgets.allocate import allocate
from kvfold.formats import LOG_MASS
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods.base import decided
from kvfold.methods.d2o import APART, D2O, SCORE, THRESHOLD, spread
from kvfold.methods.full import Full
from kvfold.views import LayerView
from kvfold.views.decisions import Amend
from stack import Stack, positions
from views import full_probabilities, place, prompt_view, random_view, row_of, run, top

PLAIN = {"sinks": 0, "recent": 0.0, "skip": ()}
LAYERS = {"layer": 0, "ordinal": 0, "paged": tuple(range(5)), "depth": 5}


class Layers(Stack):
    """A stack of layers whose method also decides when the last of them is read."""

    def __init__(self, method, views):
        super().__init__(method, views)
        for layer, decisions in method.after_forward(self).items():
            self.done[layer] = self._decide(self.done[layer], decisions)


def test_oracle_1_layers_share_by_softmax():
    two = place(torch.tensor([100]), layer=0, ordinal=0, paged=(0, 1), depth=2)
    (weights,) = D2O(skip=()).shares(np.array([[0.0, math.log(2)]]), two, [0.3])
    assert [w / sum(weights) * 2 * 0.3 for w in weights] == pytest.approx([0.4, 0.2])


def test_skipped_layers_are_paid_by_the_others():
    five = place(torch.tensor([100]), **LAYERS)
    (weights,) = D2O().shares(np.zeros((1, 5)), five, [0.5])
    assert weights == pytest.approx((7 / 6, 7 / 6, 0.75, 0.75, 7 / 6))
    (skewed,) = D2O().shares(np.array([[9.0, 0, 0, math.log(3), 0]]), five, [0.5])
    assert skewed == pytest.approx((7 / 6, 7 / 6, 1.125, 0.375, 7 / 6))


def test_the_spread_of_variances_over_heads():
    view = random_view(B=1, H=3, T=4)
    scores = torch.tensor([[[1.0, 1, 1, 1], [0, 0, 0, 4], [2, 2, 0, 0]]])  # variances 0, 4 and 4/3
    assert spread(view, scores[:, :, None]).item() == pytest.approx((0 + 1 + 1 / 3) / 3, abs=1e-5)


def folded(method: D2O, keys: list[list[float]], values: list[list[float]], stays: list[int], before: float = 0.0):
    """Keys and values of one head after what is not in `stays` went; a threshold of `before` is there."""
    k, v = torch.tensor([[keys]]), torch.tensor([[values]])
    view = prompt_view(torch.zeros_like(k), k, v)
    column = torch.full(view.valid.shape, before + APART)
    view = replace(view, tokens=view.tokens.but(view.valid, {**view.columns, THRESHOLD: column}))
    scores = torch.zeros(view.valid.shape).index_fill(2, torch.tensor(stays), 1.0)
    for decision in method.merged(view, torch.tensor([[len(stays)]]), scores):
        view = view.apply(decision)
    assert view.valid[0, 0].nonzero()[:, 0].tolist() == stays
    return view


HALF = [0.5, 3**0.5 / 2, 0.0]


@pytest.mark.parametrize(
    ("sent", "weights"),
    [
        ([[1.0, 0, 0]], [0.5, 0.5]),
        ([HALF], [0.377541, 0.622459]),
        ([[1.0, 0, 0], HALF], [0.383652, 0.232697, 0.383652]),
    ],
    ids=["equal", "half", "both"],
)
def test_oracle_2_weights(sent, weights):
    keys = [*sent, [1.0, 0, 0], [0, 0, 1.0]]
    values = torch.eye(len(keys)).tolist()
    view = folded(D2O(beta=0.0, **PLAIN), keys, values, [len(sent), len(sent) + 1])
    assert_close(view.values[0, 0, len(sent), : len(weights)], torch.tensor(weights), atol=1e-6, rtol=0)
    expected = sum(w * torch.tensor(k) for w, k in zip(weights, keys, strict=False))
    assert_close(view.keys[0, 0, len(sent)], expected, atol=1e-6, rtol=0)
    assert torch.equal(view.keys[0, 0, -1], torch.tensor([0, 0, 1.0]))
    assert LOG_MASS not in view.columns


def test_oracle_3_the_weights_of_the_code():
    keys, values = [HALF, [1.0, 0, 0], [0, 0, 1.0]], [[0.0, 2], [2, 0], [0, 0]]
    view = folded(D2O(beta=0.0, weights="cosine_mean", **PLAIN), keys, values, [1, 2])
    assert_close(view.values[0, 0, 1], torch.tensor([1.0, 0.5]), atol=1e-6, rtol=0)


def threshold(method: D2O, cosine: list[float], before: float | None = None) -> tuple[float, list[bool]]:
    view = random_view(T=len(cosine))
    if before is not None:
        column = torch.full(view.valid.shape, before + APART)
        view = replace(view, tokens=view.tokens.but(view.valid, {**view.columns, THRESHOLD: column}))
    alike = torch.tensor([[cosine]])
    tau, column = method.threshold(view, alike)
    assert_close(column, (tau + APART).expand_as(column))
    return tau.item(), (alike >= tau - 1e-6)[0, 0].tolist()


def test_oracle_4_the_first_threshold_is_the_mean():
    assert threshold(D2O(), [0.9, 0.5, -math.inf]) == (pytest.approx(0.7), [True, False, False])
    assert threshold(D2O(), [0.3, 0.3, 0.3])[1] == [True] * 3


def test_oracle_5_it_moves():
    assert threshold(D2O(beta=0.7), [0.8], before=0.6)[0] == pytest.approx(0.74)
    assert threshold(D2O(beta=0.7), [0.7, 0.9], before=0.6) == (pytest.approx(0.74), [False, True])
    assert threshold(D2O(), [-math.inf], before=0.6)[0] == pytest.approx(0.6)  # nothing left: it stays


def views_of(count: int, seed: int = 0, **options: object) -> list[LayerView]:
    return [random_view(seed=seed + 10 * i, **options) for i in range(count)]  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [1.0, 40, 60])
def test_oracle_6_nothing_goes_when_there_is_room(budget):
    done = Layers(D2O(budget=budget), views_of(3, B=2, H=2, T=40, left_pad=(0, 5))).done
    assert [positions(view) for view in done] == [[[list(range(40))] * 2, [list(range(35))] * 2]] * 3
    assert not any(view.amended for view in done)


def test_oracle_6_a_threshold_out_of_reach_only_evicts():
    keys = [[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]]
    view = folded(D2O(beta=0.0, **PLAIN), keys, keys, [1, 2], before=1.5)
    assert torch.equal(view.keys, torch.tensor([[keys]])) and not view.amended


def slow(views: list[LayerView], row: int, budget: int, method: D2O) -> list[list[tuple[list[int], list[Tensor]]]]:
    """The card's steps 1 to 8 for one row without its padding: kept slots and their merged keys, by layer and head."""
    apart = [full_probabilities(view, row).sum(1) for view in views]
    sums = [found.view(view.heads, -1, found.shape[-1]).sum(1) for view, found in zip(views, apart, strict=True)]
    signals = []
    for found in apart:
        variance = [float(np.var(head.numpy(), ddof=1)) for head in found]  # of query heads
        low, high = min(variance), max(variance)
        signals.append(sum((x - low) / (high - low + 1e-6) for x in variance) / len(variance))
    total = sums[0].shape[-1]
    shares = tuple(math.exp(-x) for x in signals)
    counts = allocate(budget, total, total, len(views), views[0].heads, shares)
    result = []
    for layer, view in enumerate(views):
        alone, chosen, routes = row_of(view, row), [], []
        for head in range(view.heads):
            count = counts[layer][head]
            last = max(1, int(count * method.recent))
            always = set(range(total - last, total)) | set(range(min(method.sinks, count - last)))
            score = [math.inf if i in always else float(x) for i, x in enumerate(sums[layer][head])]
            kept = top(score, count)
            chosen.append(kept)
            keys = alone.keys[0, head]
            for e in set(range(total)) - set(kept):
                cosines = [(torch.cosine_similarity(keys[e], keys[c], dim=0).item(), c) for c in kept]
                u, c = max(cosines, key=lambda pair: (pair[0], -pair[1]))
                routes.append((head, e, c, u))
        tau = sum(u for *_, u in routes) / len(routes)
        heads = []
        for head, kept in enumerate(chosen):
            keys, merged = alone.keys[0, head], []
            for c in kept:
                members = [(e, u) for h, e, t, u in routes if h == head and t == c and u >= tau]
                z = math.e + sum(math.exp(u) for _, u in members)
                merged.append(math.e / z * keys[c] + sum(math.exp(u) / z * keys[e] for e, u in members))
            heads.append((kept, merged))
        result.append(heads)
    return result


@pytest.mark.parametrize(("seed", "heads"), [(0, 2), (1, 2), (2, 1)])
def test_against_a_loop(seed, heads):
    method = D2O(budget=11, skip=(), sinks=2)
    views = views_of(3, seed, B=2, H=heads, G=4 // heads, T=34, D=8, left_pad=(0, 7))
    done = Layers(method, views).done
    for row in range(2):
        for layer, heads in enumerate(slow(views, row, 11, method)):
            for head, (kept, keys) in enumerate(heads):
                view = done[layer]
                here = view.valid[row, head]
                assert view.positions[row, head][here].tolist() == kept
                assert_close(view.keys[row, head][here], torch.stack(keys), atol=1e-5, rtol=1e-5)


def test_while_decoding_one_leaves_and_merges_alone():
    """Step by step against the same steps on dense tensors."""
    view = random_view(H=2, G=2, T=30, seed=1)
    method = D2O(budget=12, skip=(), sinks=2)
    cache, _ = run(method, view.queries.states, view.keys, view.values, [10, *[1] * 20])
    assert (cache.counts() == 12).all()
    stored = cache.stored.tokens()[0]
    tau = (stored.columns[THRESHOLD] - APART)[stored.valid]
    assert ((tau.abs() <= 1) & (tau != 0)).all()
    merged = [
        not torch.equal(stored.keys[0, h, i], view.keys[0, h, stored.positions[0, h, i]])
        for h, i in stored.valid[0].nonzero().tolist()
    ]
    assert 0 < sum(merged) < len(merged)
    assert (stored.columns[SCORE][stored.valid] > 0).all()


def test_while_decoding_scores_add_up():
    """The token that goes got the least of all queries since it came, whatever merged into its key meanwhile."""
    view = random_view(H=2, G=2, T=40, D=16, seed=3)
    q, k, v = view.queries.states, view.keys, view.values
    method, prompt, budget = D2O(budget=12, recent=0.25, skip=(), sinks=2), 10, 12
    cache = KVLayer(Rows(method), 0)
    cache.attend(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt], None, 0.25, Plan(prefill=True))
    sums = full_probabilities(view, 0)[:, :prompt].sum(1).view(2, 2, -1).sum(1)  # H T
    held, forgetful = [list(range(prompt))] * 2, 0
    for t in range(prompt, 40):
        stored, here = cache.stored.tokens()[0], slice(t, t + 1)
        for head in range(2):
            keys = {p: stored.keys[0, head, i] for i, p in enumerate(stored.positions[0, head].tolist())}
            keys = torch.stack([keys[p] for p in held[head]] + [k[0, head, t]])
            held[head] = [*held[head], t]
            got = (q[0, 2 * head : 2 * head + 2, t] @ keys.T * 0.25).softmax(-1).sum(0)
            sums[head, held[head]] += got
            if len(held[head]) > budget:
                free = held[head][2 : budget + 1 - 3]
                gone = min(free, key=lambda p, h=head: sums[h, p].item())
                forgetful += gone != free[int(got[2 : budget + 1 - 3].argmin())]
                held[head].remove(gone)
        cache.attend(q[:, :, here], k[:, :, here], v[:, :, here], None, 0.25, Plan(prefill=False))
        assert cache.kept()[0] == held
    assert forgetful > 20  # the newest query alone would have dropped others


@pytest.mark.parametrize("weights", ["convex", "cosine_mean"])
def test_equal_tokens_are_merged_without_loss_when_they_are_counted(weights):
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(1, 1, 6, 16, generator=rng)
    q = torch.randn(1, 2, 40, 16, generator=rng)
    k = base[:, :, torch.arange(40) % 6]
    method = D2O(budget=12, mass="counted", weights=weights, beta=0.0, skip=(), sinks=6)
    _, outs = run(method, q, k, k, [24, *[1] * 16])
    for out, expected in zip(outs, run(Full(), q, k, k, [24, *[1] * 16])[1], strict=True):
        assert_close(out, expected, atol=1e-5, rtol=1e-4)
    _, convex = run(replace(method, mass="convex"), q, k, k, [24, *[1] * 16])
    assert (convex[-1] - expected).abs().max() > 1e-3


def test_row_alone():
    views = views_of(3, B=2, H=2, G=2, T=30, left_pad=(0, 9))
    both = Layers(D2O(budget=0.4), views).done
    for row in range(2):
        alone = Layers(D2O(budget=0.4), [row_of(view, row) for view in views]).done
        for one, two in zip(both, alone, strict=True):
            assert positions(one)[row] == positions(two)[0]
            assert_close(one.keys[row][one.valid[row]], two.keys[0][two.valid[0]], atol=1e-5, rtol=1e-5)


def test_a_step_writes_only_what_it_merges():
    view = random_view(H=2, T=12)
    decisions = decided(D2O(**PLAIN).merged(view, torch.tensor([[11, 11]]), view.column_sums()))
    assert isinstance(decisions[0], Amend) and decisions[0].slots.shape[-1] <= 2


@pytest.mark.parametrize(
    "options",
    [{"budget": 0}, {"recent": 1.5}, {"sinks": -1}, {"beta": 2.0}, {"weights": "mean"}, {"mass": "paper"}, {"skip": 1}],
)
def test_bad_options(options, unchecked):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        D2O(**options)
