"""R-KV against its formula: attention of the newest queries less the redundancy of keys."""

import math

import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold.methods.r_kv import RKV
from kvfold.scores.redundant import BLOCK, redundancy
from kvfold.views import LayerView
from models import subject, tokens
from saying import read
from views import asked_view, full_probabilities, kept, plant, prompt_view, random_view, row_of, top


def keyed(*rows: list[float]) -> LayerView:
    """One head with these keys, and queries that ask nothing."""
    keys = torch.tensor(rows)[None, None]
    return prompt_view(torch.zeros_like(keys), keys, keys)


TWINS = [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]


def test_oracle_1_the_newest_of_those_that_repeat_is_spared():
    """Twins 0, 2, 3: the cosines to 3 of 0 and 2 count as 0, and those of 3 to 2; what is left is 0-2 and back, 3-0."""
    assert_close(redundancy(keyed(*TWINS), 0.5)[0, 0], torch.tensor([2.0, 0.0, 1.0, 0.0]) / 4 * 1.0)


def test_oracle_2_likeness_below_the_threshold_is_counted_in_full():
    angle = math.radians(70)
    near = math.cos(angle)
    view = keyed([1.0, 0.0], [near, math.sin(angle)])
    assert_close(redundancy(view, 0.5)[0, 0], torch.tensor([near, near]) / 2)
    assert_close(redundancy(view, 0.3)[0, 0], torch.zeros(2))


def test_oracle_3_by_redundancy_alone_the_odd_and_the_newest_stay():
    view = keyed(*TWINS, [0.0, -1.0])
    assert kept(RKV(budget=3, interval=0, window=1, mix=0.0), view) == [[[1, 3, 4]]]


def test_oracle_4_importance_is_the_highest_share_nearby():
    """Two queries in the window; the second looks at token 1 alone, the first at 0 and 4 alike; a kernel of 3."""
    logits = torch.full((1, 1, 1, 2, 8), -30.0)
    logits[..., 0, [0, 4]] = 5.0
    logits[..., 1, 1] = 5.0
    found = RKV(window=2, kernel=3).importance(asked_view(logits, queries=2))
    assert_close(found[0, 0], torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.0, 0.0]), atol=1e-5, rtol=0)
    found = RKV(window=2, kernel=1).importance(asked_view(logits, queries=2))
    assert_close(found[0, 0], torch.tensor([0.25, 0.5, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0]), atol=1e-5, rtol=0)


def test_oracle_5_what_the_window_gives_itself_does_not_count():
    """A query that looks at itself most still shares out a whole over what is before."""
    logits = torch.tensor([[0.0, 1.0, 0.5, 9.0]])[None, None, None]
    before = torch.tensor([0.0, 1.0, 0.5]).softmax(-1)
    assert_close(RKV(window=1, kernel=1).importance(asked_view(logits))[0, 0], torch.cat([before, torch.zeros(1)]))


def slow_redundancy(keys: list[list[float]], threshold: float) -> list[float]:
    """The whole matrix, cell by cell."""
    norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
    n = range(len(keys))
    cosines = [
        [0.0 if i == j else sum(a * b for a, b in zip(keys[i], keys[j], strict=True)) / norms[i] / norms[j] for j in n]
        for i in n
    ]
    for row in cosines:
        liker = [j for j in n if row[j] > threshold]
        if liker:
            row[liker[-1]] = 0.0
    return [sum(cosines[i][j] for i in n) / len(keys) for j in n]


def slow_rkv(view: LayerView, head: int, method: RKV, budget: int) -> list[int]:
    """The formula, step by step, for one KV head of a row without padding and with room for the window."""
    group = view.queries.states.shape[1] // view.heads
    probs = full_probabilities(view, 0)[head * group : (head + 1) * group].double()
    total = probs.shape[-1]
    before = total - method.window
    mean = [0.0] * before
    for i in range(before, total):
        most = [max(float(probs[g, i, t]) for g in range(group)) for t in range(before)]
        mean = [a + b / sum(most) / method.window for a, b in zip(mean, most, strict=True)]
    reach = method.kernel // 2
    importance = [max(mean[max(0, t - reach) : t + reach + 1]) for t in range(before)]
    repeated = [math.exp(x) for x in slow_redundancy(view.keys[0, head].double().tolist(), method.threshold)]
    scores = [
        method.mix * importance[t] - (1 - method.mix) * repeated[t] / sum(repeated) for t in range(before)
    ]  # fmt: skip
    return top(scores, budget - method.window) + list(range(before, total))


@pytest.mark.parametrize(
    ("budget", "window", "kernel", "mix", "threshold", "seed"),
    [(20, 8, 7, 0.1, 0.5, 0), (13, 4, 3, 0.5, 0.2, 1), (16, 2, 1, 0.0, 0.5, 2), (16, 2, 5, 1.0, 0.9, 3)],
)
def test_against_a_loop(budget, window, kernel, mix, threshold, seed):
    """Longer than a block of keys, so that blocks meet."""
    view = random_view(B=2, H=2, G=3, T=BLOCK + 9, D=6, left_pad=(0, 11), seed=seed)
    method = RKV(budget=budget, interval=0, window=window, kernel=kernel, mix=mix, threshold=threshold)
    left = kept(method, view)
    for row in range(2):
        for head in range(2):
            assert left[row][head] == slow_rkv(row_of(view, row), head, method, budget), f"row {row}, head {head}"


def test_redundancy_against_a_loop_with_holes():
    view = random_view(B=2, H=2, T=BLOCK + 5, D=4, left_pad=(0, 20))
    found = redundancy(view, 0.5)
    for row in range(2):
        for head in range(2):
            here = view.valid[row, head]
            expected = slow_redundancy(view.keys[row, head][here].double().tolist(), 0.5)
            assert_close(found[row, head][here].double(), torch.tensor(expected).double(), atol=1e-6, rtol=1e-5)
            assert (found[row, head][~here] == 0).all()


def test_keeps_the_planted_key_and_the_window():
    view = plant(random_view(B=2, H=2, G=4, T=64, D=16, left_pad=(0, 10)), at=20, asked_by=slice(-8, None))
    for row, pad in zip(kept(RKV(budget=16, interval=0), view), (0, 10), strict=True):
        for head in row:
            assert 20 - pad in head and set(range(56 - pad, 64 - pad)) <= set(head) and len(head) == 16


def test_a_small_budget_keeps_both_ends():
    view = random_view(T=40)
    assert kept(RKV(budget=8, interval=0), view) == [[[0, 1, 2, 3, 36, 37, 38, 39]]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0"), ({"kernel": 4}, "kernel=4"), ({"mix": 1.5}, "mix=1.5"),
        ({"threshold": 2.0}, "threshold=2.0"), ({"budget": 0}, "budget=0"),
    ],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RKV(**options)


def test_it_cuts_what_is_generated_at_intervals():
    """As the code does while decoding, but for the budget, which has the interval's tokens in it."""
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), "r-kv(budget=40, interval=10, window=4)")
    read(model, cache, tokens(60)["input_ids"])
    held = []
    for step in tokens(30)["input_ids"].T:
        read(model, cache, step[:, None])
        held.append(cache.kept_tokens)
    assert held == ([*range(32, 41), 31] * 3)
    assert [kvfold.parse("r-kv", budget=b).period for b in (1, 100, 256, 5000, 0.5, 1.0)] == [1, 50, 128, 128, 128, 0]
