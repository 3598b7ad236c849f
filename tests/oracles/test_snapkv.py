"""SnapKV against its card: the end of the prompt votes, votes are pooled, the window stays."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.methods.base import decided
from kvfold.methods.snapkv import SnapKV
from kvfold.methods.tova import TOVA
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from views import asked_view, full_probabilities, kept, plant, prompt_view, random_view, row_of, run, spared, top

VOTES = [6.0, 1, 2, 0, 5, 3, 0, 0]


def voted(votes: list[float], window: int, per_query: float = 10.0) -> LayerView:
    """Each of the last `window` queries gives `votes` / window of attention, in units of `per_query`."""
    share = torch.tensor(votes) / (per_query * window)
    weights = torch.cat([share.clamp(min=1e-30), torch.zeros(window)]).repeat(window, 1)
    for i in range(window):  # the rest goes to the query's own token, which the window holds
        weights[i, len(votes) + i] = 1 - share.sum()
    return asked_view(weights.clamp(min=1e-30).log()[None, None, None], window)


def test_oracle_1_pooling_loses_the_border():
    view = voted(VOTES, window=2, per_query=20.0)
    assert kept(SnapKV(budget=5, window=2, kernel=3), view) == [[[1, 4, 5, 8, 9]]]
    assert kept(SnapKV(budget=5, window=2, kernel=1), view) == [[[0, 4, 5, 8, 9]]]
    # max pooling over [6, 6, 2, 5, 5, 5, 3, 0]: the border stays
    assert kept(SnapKV(budget=5, window=2, kernel=3, pool="max"), view) == [[[0, 1, 3, 8, 9]]]


def test_oracle_1_is_the_same_behind_padding():
    """Zeros of the padding are the zeros beyond the border."""
    view = voted(VOTES, window=2, per_query=20.0)
    q, k = (torch.cat([torch.full_like(x[:, :, :3], 9.0), x], 2) for x in (view.queries.states, view.keys))
    padded = prompt_view(q, k, k, torch.arange(13)[None] >= 3, 1.0)
    assert kept(SnapKV(budget=5, window=2, kernel=3), padded) == [[[1, 4, 5, 8, 9]]]


def test_oracle_2_with_one_query_and_no_pooling_it_is_tova():
    """Apart from the newest token, which TOVA may drop; here it looks at itself most."""
    view = random_view(H=1, G=4, T=30, seed=1)
    view = plant(view, at=29, asked_by=slice(-1, None), strength=4.0)
    assert 29 in kept(TOVA(budget=8), view)[0][0]
    assert kept(SnapKV(budget=8, window=1, kernel=1), view) == kept(TOVA(budget=8), view)


@pytest.mark.parametrize("budget", [9, 10, 11, 1.0])
def test_oracle_3_nothing_goes_when_there_is_room(budget):
    view = random_view(B=2, H=2, T=10, left_pad=(0, 1))
    if budget == 9:
        assert [len(head) for row in kept(SnapKV(budget=9), view) for head in row] == [9] * 4
    else:
        assert kept(SnapKV(budget=budget), view) == [[list(range(10))] * 2, [list(range(9))] * 2]


def test_oracle_4_the_votes_are_at_most_the_window():
    view = random_view(B=2, H=2, G=3, T=25, left_pad=(0, 12))
    votes = view.attention(8).sum(3).masked_fill(view.last(8)[:, :, None], 0.0)
    assert (votes.sum(-1) <= 8).all() and (votes.sum(-1) > 0).all()


@pytest.mark.parametrize("last", [8, 12])
def test_oracle_5_chunks_change_nothing_when_the_last_holds_the_window(last):
    """Chunks before the last one must not be cut: that is what a deferred decision does, here by an idle budget."""
    view = random_view(H=2, G=2, T=40, D=16)
    whole = kept(SnapKV(budget=12, window=8), view)
    old = torch.arange(40) < 40 - last
    queries = view.queries.pick(torch.arange(40 - last, 40))
    assert view.earlier.sum() == 0 and replace(view, queries=queries).earlier[0, 0].equal(old)
    assert kept(SnapKV(budget=12, window=8), replace(view, queries=queries)) == whole


def test_oracle_6_equal_heads_of_a_group_vote_like_one():
    one = random_view(H=2, G=1, T=30, seed=4)
    q = one.queries.states.repeat_interleave(2, 1)
    two = prompt_view(q, one.keys, one.values)
    assert kept(SnapKV(budget=10, window=4), two) == kept(SnapKV(budget=10, window=4), one)


def slow_snapkv(view: LayerView, row: int, head: int, budget: int, window: int, kernel: int, pool: str) -> list[int]:
    """The card, step by step, for one KV head of one row without its padding."""
    group = view.queries.states.shape[1] // view.heads
    probs = full_probabilities(view, row)[head * group : (head + 1) * group]
    total = probs.shape[-1]
    if len(ends := spared(total, budget, window)) >= min(budget, total):
        return ends
    window = min(window, total)
    votes = [float(probs[:, total - window :, j].sum(1).mean()) for j in range(total - window)]
    pooled = []
    for j in range(len(votes)):
        around = [votes[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < len(votes)]
        pooled.append(max(around) if pool == "max" else sum(around) / kernel)
    return top(pooled, budget - window) + list(range(total - window, total))


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize(
    ("budget", "window", "kernel", "seed"), [(13, 4, 3, 0), (20, 8, 7, 1), (9, 8, 1, 2), (5, 8, 5, 3)]
)
def test_against_a_loop(pool, budget, window, kernel, seed):
    view = random_view(B=3, H=2, G=3, T=41, D=16, left_pad=(0, 7, 36), seed=seed)
    left = kept(SnapKV(budget=budget, window=window, kernel=kernel, pool=pool), view)
    for row, tokens in enumerate((41, 34, 5)):
        for head in range(2):
            expected = slow_snapkv(view, row, head, min(budget, tokens), window, kernel, pool)
            assert left[row][head] == expected, f"row {row}, head {head}"


def test_keeps_the_planted_key():
    view = random_view(B=2, H=2, G=4, T=64, D=16, left_pad=(0, 10))
    view = plant(view, at=20, asked_by=slice(-8, None))
    for row, pad in zip(kept(SnapKV(budget=16, window=8), view), (0, 10), strict=True):
        assert all(20 - pad in head for head in row)


def test_a_needle_that_only_earlier_queries_ask_for_is_lost():
    view = plant(random_view(H=1, T=64, D=16), at=20, asked_by=slice(30, 50))
    q = view.queries.states.clone()
    q[..., 0] = torch.where((torch.arange(64) >= 56), -20.0, q[..., 0])  # the window looks away from it
    view = prompt_view(q, view.keys, view.values)
    assert 20 not in kept(SnapKV(budget=16, window=8, kernel=1), view)[0][0]


@given(st.integers(1, 30), st.integers(0, 9), st.integers(1, 40), st.integers(1, 12), st.sampled_from([1, 3, 5]))
def test_the_budget_is_exact_and_the_window_stays(length, pad, budget, window, kernel):
    view = random_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, 0), seed=length)
    left = kept(SnapKV(budget=budget, window=window, kernel=kernel), view)
    for row, tokens in enumerate((length, length + pad)):
        for head in left[row]:
            assert len(head) == min(budget, tokens)
            assert set(spared(tokens, min(budget, tokens), window)) <= set(head)


def test_a_second_turn_in_a_ragged_batch_equals_each_row_alone():
    """Rows keep different numbers of tokens; the empty slots between stored and new ones are nobody's neighbours."""
    method = SnapKV(budget=0.5, window=4, kernel=5)
    view = random_view(B=2, H=2, G=2, T=60, D=16, left_pad=(0, 20), seed=9)
    q, k, v, mask = view.queries.states, view.keys, view.values, view.queries.valid
    both, _ = run(method, q, k, v, [40, 20], mask)
    for row, pad in enumerate((0, 20)):
        one = slice(row, row + 1)
        alone, _ = run(method, q[one, :, pad:], k[one, :, pad:], v[one, :, pad:], [40 - pad, 20])
        assert both.kept()[row] == alone.kept()[0]


def test_after_an_earlier_stage_only_what_is_left_competes():
    view = random_view(B=2, H=2, T=40, D=16, left_pad=(0, 6))
    thin = torch.arange(40) % 2 == 0
    (decision,) = decided(SnapKV(budget=10, window=4).after_prefill(view.apply(Keep(thin.expand(2, 2, 40).clone()))))
    assert isinstance(decision, Keep)
    assert not (decision.mask & ~thin).any() and (decision.mask.sum(-1) == 10).all()


def test_row_alone():
    view = random_view(B=2, H=2, G=2, T=33, left_pad=(5, 0), seed=8)
    method = SnapKV(budget=0.4, window=4)
    for row in range(2):
        assert kept(method, row_of(view, row))[0] == kept(method, view)[row]


def test_votes_of_a_whole_window_are_a_mean_over_the_group():
    view = random_view(H=1, G=3, T=20)
    votes = view.attention(20).sum(3).mean(2)[0, 0]
    assert_close(votes, full_probabilities(view, 0).sum(1).mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"window": 0}, {"kernel": 4}, {"kernel": 0}, {"pool": "sum"}, {"budget": 2.0}])
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        SnapKV(**options)


def test_padding_may_stand_anywhere():
    """Behind the prompt or inside it: what a row keeps is what it keeps alone."""
    view = random_view(B=3, H=2, G=2, T=40, D=16, seed=5)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, 30:] = False
    mask[1, [3, 4, 17, 33, 38, 39]] = False
    view = prompt_view(view.queries.states, view.keys, view.values, mask)
    method = SnapKV(budget=11, window=5)
    for row in range(3):
        assert kept(method, view)[row] == kept(method, row_of(view, row))[0]
