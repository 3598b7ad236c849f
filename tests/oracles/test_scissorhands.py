"""Scissorhands against its card: counts of attention below the even share, dropped in blocks while decoding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.methods.full import Full
from kvfold.methods.scissorhands import SCORE, Scissorhands
from kvfold.scores.rows import logit_rows
from kvfold.views import LayerView
from views import full_probabilities, kept, prompt_view, random_view, row_of, run, spared, step_view

ORACLE_1 = [[0.40, 0.10, 0.30, 0.20], [0.30, 0.30, 0.15, 0.25]]
ORACLE_2 = [[0.02, 0.94, 0.02, 0.02], [0.30, 0.10, 0.30, 0.30], [0.30, 0.10, 0.30, 0.30]]


def asked(rows: list[list[float]]) -> LayerView:
    """Tokens that all came before the queries, whose attention is `rows`."""
    weights = torch.tensor(rows)
    n, t = weights.shape
    q, k = torch.zeros(1, 1, t, t), torch.eye(t)[None, None]
    q[0, 0, t - n :] = weights.log()
    view = prompt_view(q, k, k, scale=1.0)
    queries = view.queries.pick(torch.arange(t - n, t))
    return replace(view, queries=replace(queries, positions=queries.positions + n))


def important(view: LayerView, window: int) -> list[float]:
    return (Scissorhands(window=window).scores(view)[0, 0] * window).round().tolist()


def test_oracle_1_the_older_of_two_goes():
    view = asked(ORACLE_1)
    assert important(view, 2) == [2 - i for i in (0, 1, 1, 1)]  # 0.25 is not below 1/4
    assert kept(Scissorhands(budget=3, window=2, recent=1), view) == [[[0, 2, 3]]]
    assert kept(Scissorhands(budget=3, window=2, recent=0), view) == [[[0, 2, 3]]]


def test_oracle_2_one_strong_vote_is_not_persistence():
    assert important(asked(ORACLE_2), 3) == [3 - i for i in (1, 2, 1, 1)]
    assert kept(Scissorhands(budget=3, window=3, recent=1), asked(ORACLE_2)) == [[[0, 2, 3]]]
    rows = [[0.97, 0.01, 0.01, 0.01], *[[0.26, 0.26, 0.24, 0.24]] * 2]
    assert important(asked(rows), 3) == [3 - i for i in (0, 1, 3, 3)]
    assert kept(Scissorhands(budget=3, window=3, recent=1), asked(rows)) == [[[0, 1, 3]]]


def test_oracle_3_even_attention_leaves_only_the_tie_rule():
    view = random_view(H=2, G=2, T=37)
    view = prompt_view(torch.zeros_like(view.queries.states), view.keys, view.values)
    assert (Scissorhands().scores(view) == 1).all()
    assert kept(Scissorhands(budget=5, recent=0), view) == [[list(range(32, 37))] * 2]


@pytest.mark.parametrize(("drop", "dropped"), [(0.5, 4), (0.0, 1), (0.25, 2), (1.0, 8)])
def test_oracle_4_a_block_goes_when_the_budget_is_exceeded(drop, dropped):
    view = random_view(H=2, G=2, T=60)
    method = Scissorhands(budget=8, recent=1, drop=drop)
    sizes, now = [], 8
    for steps in range(12):
        cache, _ = run(method, view.queries.states, view.keys, view.values, [20, *[1] * steps])
        assert (cache.counts() == now).all()
        sizes.append(now)
        now = now + 1 if now < 8 else 9 - dropped
    assert max(sizes) == 8


def test_oracle_5_a_large_budget_is_full_attention():
    view = random_view(B=2, H=2, G=2, T=20, left_pad=(0, 3))
    tensors = view.queries.states, view.keys, view.values, [14, *[1] * 6], view.queries.valid
    for method in (Scissorhands(budget=20), Scissorhands(budget=1.0)):
        for out, expected in zip(run(method, *tensors)[1], run(Full(), *tensors)[1], strict=True):
            assert torch.equal(out, expected)


def test_oracle_5_a_budget_of_the_recent_tokens_is_shared_with_the_first():
    assert kept(Scissorhands(budget=4, recent=4), random_view(T=12)) == [[[0, 1, 10, 11]]]  # the card keeps 8 to 11
    assert kept(Scissorhands(budget=3, recent=4, sinks=2), random_view(T=12)) == [[[0, 10, 11]]]
    assert kept(Scissorhands(budget=6, recent=4, sinks=2), random_view(T=12)) == [[[0, 1, 8, 9, 10, 11]]]


def slow_scissorhands(view: LayerView, row: int, head: int, budget: int, window: int, recent: int) -> list[int]:
    """The card, query by query, for one KV head of one row without its padding."""
    group = view.queries.states.shape[1] // view.heads
    probs = full_probabilities(view, row)[head * group : (head + 1) * group]
    total = probs.shape[-1]
    low, chances = [0] * total, [0] * total
    for i in range(max(0, total - window), total):
        for j in range(i + 1):
            chances[j] += group
            low[j] += sum(float(probs[g, i, j]) * (i + 1) < 1 - 1e-5 for g in range(group))
    left = list(range(total))
    if len(ends := spared(total, budget, recent)) == min(budget, total):
        return ends
    while len(left) > budget:
        old = left[: len(left) - recent]
        left.remove(min(old, key=lambda j: (-low[j] / chances[j], j)))
    return left


@pytest.mark.parametrize(("budget", "window", "recent"), [(13, 50, 4), (20, 8, 0), (9, 1, 3), (3, 20, 5)])
def test_against_a_loop(budget, window, recent):
    view = random_view(B=3, H=2, G=3, T=41, D=16, left_pad=(0, 7, 36), seed=budget)
    left = kept(Scissorhands(budget=budget, window=window, recent=recent), view)
    for row in range(3):
        for head in range(2):
            assert left[row][head] == slow_scissorhands(view, row, head, budget, window, recent), (row, head)


def test_what_past_queries_said_is_carried_on():
    """In one pass or step by step: the share of all queries that a token saw, while they fit into the window."""
    view = random_view(H=2, G=2, T=30, D=16)
    tensors = view.queries.states, view.keys, view.values
    whole = Scissorhands(budget=1.0).after_prefill(view).columns[SCORE]
    for chunks in ([20, *[1] * 10], [10, 20], [7, 8, 1, 14]):
        cache, _ = run(Scissorhands(budget=1.0), *tensors, chunks)
        assert_close(cache.stored.tokens()[0].columns[SCORE], whole, atol=1e-5, rtol=1e-5)


def test_the_column_forgets_what_left_the_window():
    view = asked([[0.1, 0.6, 0.2, 0.1]] * 3)
    decision = Scissorhands(budget=1.0, window=3).after_prefill(view)
    assert decision.columns[SCORE][0, 0].tolist() == [0, 1, 0, 0]
    view = replace(view, place=replace(view.place, seen=view.place.seen + 3))
    logits = torch.tensor([[0.3, 0.1, 0.2, 0.1, 0.3]]).log()
    again = Scissorhands(budget=1.0, window=3).after_decode(step_view(view, decision, logits))
    assert_close(again.columns[SCORE][0, 0], torch.tensor([1 / 3, 2 / 3, 1 / 3, 0, 1]))


def test_even_is_one_share_of_what_the_softmax_saw():
    """After evictions the threshold is one over the keys that are left, in each row and head."""
    view = random_view(B=2, H=2, T=30, left_pad=(0, 10))
    (*_, (asked_at, seen, _)) = logit_rows(view, 3)
    assert asked_at.tolist() == [[27, 28, 29], [17, 18, 19]]
    assert seen.sum(-1)[:, 0].tolist() == [[28, 29, 30], [18, 19, 20]]


@given(st.integers(1, 24), st.integers(0, 9), st.one_of(st.integers(1, 30), st.floats(0.05, 1.0)), st.integers(0, 5))
def test_the_budget_is_exact_in_every_row_and_head(length, pad, budget, recent):
    view = random_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, 0), seed=length)
    left = kept(Scissorhands(budget=budget, recent=recent), view)
    for row, tokens in enumerate((length, length + pad)):
        allowed = min(budget, tokens) * 2 if isinstance(budget, int) else int(budget * tokens * 2 + 1e-9)
        assert sum(map(len, left[row])) == allowed


def test_row_alone():
    view = random_view(B=2, H=2, G=2, T=33, left_pad=(5, 0), seed=8)
    method = Scissorhands(budget=0.4, window=9, recent=2)
    for row in range(2):
        assert kept(method, row_of(view, row))[0] == kept(method, view)[row]


@pytest.mark.parametrize(
    "options", [{"window": 0}, {"recent": -1}, {"drop": 1.5}, {"drop": -0.1}, {"sinks": -1}, {"budget": 0}]
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Scissorhands(**options)
