"""TOVA against its card: the last query alone decides, one choice for all heads of a layer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.methods.full import Full
from kvfold.methods.h2o import H2O
from kvfold.methods.tova import TOVA
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from views import asked_view, full_probabilities, kept, plant, prompt_view, random_view, run, step_view, top


def asked(*rows: list[float]) -> LayerView:
    """One KV head for each row of attention of the last query."""
    return asked_view(torch.tensor(rows).log()[None, :, None, None])


HEADS = [0.5, 0.1, 0.2, 0.05, 0.15], [0.3, 0.1, 0.4, 0.05, 0.15]


def test_oracle_1_the_mean_over_heads():
    assert kept(TOVA(budget=3), asked(*HEADS)) == [[[0, 2, 4]] * 2]
    assert kept(TOVA(budget=1), asked(*HEADS)) == [[[0]] * 2]
    assert kept(TOVA(budget=1), asked(HEADS[1])) == [[[2]]]
    grouped = asked_view(torch.tensor(HEADS).log()[None, None, :, None])  # two query heads of one KV head
    assert kept(TOVA(budget=1), grouped) == [[[0]]]


def test_oracle_2_it_has_no_memory():
    view = random_view(H=2, G=2, T=30, D=16)
    order = torch.randperm(29, generator=torch.Generator().manual_seed(1)).tolist()
    q = view.queries.states[:, :, [*order, 29]]
    shuffled = prompt_view(q, view.keys, view.values)
    assert kept(TOVA(budget=9), shuffled) == kept(TOVA(budget=9), view)
    assert kept(H2O(budget=9), shuffled) != kept(H2O(budget=9), view)


def test_oracle_3_the_newest_token_may_go():
    assert kept(TOVA(budget=2), asked([0.6, 0.3, 0.1])) == [[[0, 1]]]


def test_oracle_4_room_for_all_is_full_attention_and_room_for_one_the_largest():
    view = random_view(B=2, H=2, G=2, T=20, left_pad=(0, 4))
    tensors = view.queries.states, view.keys, view.values, [15, *[1] * 5], view.queries.valid
    for method in (TOVA(budget=20), TOVA(budget=1.0)):
        for out, expected in zip(run(method, *tensors)[1], run(Full(), *tensors)[1], strict=True):
            assert torch.equal(out, expected)
    for row in range(2):
        most = full_probabilities(view, row)[:, -1].mean(0).argmax().item()
        assert kept(TOVA(budget=1), view)[row] == [[most]] * 2


def test_oracle_6_one_token_leaves_at_each_step():
    view = asked(*HEADS)
    decision = TOVA(budget=3).after_prefill(view)
    rows = torch.tensor([[0.1, 0.5, 0.1, 0.3], [0.3, 0.3, 0.1, 0.3]])  # mean .2 .4 .1 .3 over 0, 2, 4, 5
    assert kept(TOVA(budget=3), step_view(view, decision, rows.log()), "after_decode") == [[[0, 2, 5]] * 2]


def slow_tova(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: int, prompt: int):
    """The official loop for one row: q (Hq, T, D), k, v (H, T, D)."""
    cache: list[int] = []
    outs = []
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    for t in range(q.shape[1]):
        cache.append(t)
        probs = (torch.einsum("hd,htd->ht", q[:, t], k[:, cache]) * q.shape[2] ** -0.5).softmax(-1)
        outs.append(torch.einsum("ht,htd->hd", probs, v[:, cache]))
        if t >= prompt - 1:
            best = top(probs.mean(0).tolist(), budget)
            cache = [cache[j] for j in best]
    return torch.stack(outs, 1), cache


@pytest.mark.parametrize(("group", "budget"), [(1, 5), (3, 8), (2, 1)])
def test_against_the_official_loop(group, budget):
    view = random_view(H=2, G=group, T=31, D=16, seed=budget)
    q, k, v = view.queries.states, view.keys, view.values
    cache, outs = run(TOVA(budget=budget), q, k, v, [17, *[1] * 14])
    expected, left = slow_tova(q[0], k[0], v[0], budget, prompt=17)
    assert_close(torch.cat(outs, 2)[0], expected, atol=1e-5, rtol=1e-4)
    assert cache.kept() == [[left] * 2]


@given(st.integers(1, 24), st.integers(0, 9), st.one_of(st.integers(1, 30), st.floats(0.05, 1.0)))
def test_oracle_5_all_heads_keep_the_same_and_never_more_than_the_budget(length, pad, budget):
    view = random_view(B=2, H=3, G=2, T=length + pad, left_pad=(pad, 0), seed=length)
    left = kept(TOVA(budget=budget), view)
    for row, tokens in enumerate((length, length + pad)):
        allowed = min(budget, tokens) if isinstance(budget, int) else int(budget * tokens + 1e-9)
        assert left[row][0] == left[row][1] == left[row][2]
        assert len(left[row][0]) == allowed
        probs = full_probabilities(view, row)[:, -1].mean(0)
        if 0 < allowed < tokens:
            gone = [j for j in range(tokens) if j not in left[row][0]]
            assert probs[left[row][0]].min() >= probs[gone].max() - 1e-6


def test_heads_that_hold_other_tokens_meet_at_text_positions():
    """An earlier stage left the first head other slots: a token's score is the mean over the heads that hold it."""
    view = asked(*HEADS)
    gone = torch.zeros(1, 2, 5, dtype=torch.bool)
    gone[0, 0, 1], gone[0, 1, 4] = True, True
    thin = view.apply(Keep(~gone))
    side = replace(thin, tokens=thin.tokens.take(torch.tensor([[[0, 2, 3, 4, 1], [0, 1, 2, 3, 4]]])))  # as in a cache
    one, two = (
        [x / sum(row[i] for i in left) for x in row]
        for row, left in zip(HEADS, ([0, 2, 3, 4], [0, 1, 2, 3]), strict=True)
    )
    expected = [(one[0] + two[0]) / 2, two[1], (one[2] + two[2]) / 2, (one[3] + two[3]) / 2, one[4]]
    for here in (thin, side):
        scores = TOVA().scores(here)
        for head, left in enumerate(([0, 2, 3, 4], [0, 1, 2, 3])):
            valid = here.valid[0, head]
            assert here.positions[0, head][valid].tolist() == left
            assert_close(scores[0, head][valid], torch.tensor([expected[p] for p in left]))


def test_keeps_the_planted_key():
    view = plant(random_view(B=2, H=2, T=40, D=16, left_pad=(0, 8)), at=20, asked_by=slice(-1, None))
    assert [row[0][0] for row in kept(TOVA(budget=1), view)] == [20, 12]


@pytest.mark.parametrize("budget", [0, -3, 0.0, 1.01, float("nan")])
def test_bad_options(budget):
    with pytest.raises(ValueError, match=f"budget={budget!r}"):
        TOVA(budget=budget)
