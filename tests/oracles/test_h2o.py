"""H2O against its card: accumulated attention, a recent window, one eviction for each generated token."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.methods.full import Full
from kvfold.methods.h2o import H2O, SCORE
from kvfold.views import LayerView
from views import asked_view, full_probabilities, kept, plant, random_view, row_of, run, step_view, top


class Scored(LayerView):
    """A view whose column sums are given."""

    def column_sums(self):
        return self.place.module


def scored(scores: list[float]) -> LayerView:
    view = random_view(T=len(scores), D=4)
    place = replace(view.place, module=torch.tensor([[scores]]))
    return Scored(view.tokens, view.queries, place)


def slow_h2o(probs, values, heavy: int, recent: int, prompt: int) -> tuple[list[torch.Tensor], list[int]]:
    """The paper's loop for the G query heads of one KV head; probs (G, T, T) unnormalised exp of logits."""
    total = probs.shape[-1]
    cache = list(range(prompt))
    score = {j: 0.0 for j in cache}
    outs = []
    for i in range(total):
        if i >= prompt:
            cache.append(i)
            score[i] = 0.0
        here = [j for j in cache if j <= i]
        weights = probs[:, i, here] / probs[:, i, here].sum(-1, keepdim=True)
        outs.append(weights @ values[here])
        for j, weight in zip(here, weights.sum(0).tolist(), strict=True):
            score[j] += weight
        if i >= prompt - 1:
            old = cache[: len(cache) - recent] if recent else cache
            room = heavy + recent - min(recent, len(cache))
            best = top([score[j] for j in old], room)
            cache = [old[j] for j in best] + (cache[len(cache) - recent :] if recent else [])
    return outs, cache


def test_oracle_1_a_recent_token_takes_no_heavy_slot():
    view = scored([0.5, 3, 0.2, 1.5, 9, 0.1])
    assert kept(H2O(budget=4), view) == [[[1, 3, 4, 5]]]


def test_oracle_2_scores_are_carried_on():
    view = scored([0.5, 3, 0.2, 1.5, 9, 0.1])
    decision = H2O(budget=4).after_prefill(view)
    weights = torch.tensor([[0.1, 0.05, 0.5, 0.2, 0.15]])
    step = step_view(view, decision, weights.log())
    decision = H2O(budget=4).after_decode(step)
    assert_close(decision.columns[SCORE][0, 0], torch.tensor([3.1, 1.55, 9.5, 0.3, 0.15]))
    assert kept(H2O(budget=4), step, "after_decode") == [[[1, 4, 5, 6]]]


@pytest.mark.parametrize("group", [1, 3])
def test_oracle_3_the_scores_of_a_head_sum_to_the_queries(group):
    view = random_view(B=2, H=2, G=group, T=33, left_pad=(0, 7))
    score = H2O().after_prefill(view).columns[SCORE]
    assert_close(score.sum(-1), group * torch.tensor([[33.0] * 2, [26.0] * 2]))
    assert (score[1, :, :7] == 0).all()


def test_oracle_3_kept_scores_never_exceed_the_queries_so_far():
    view = random_view(H=2, T=40)
    cache, _ = run(H2O(budget=8), view.queries.states, view.keys, view.values, [20, *[1] * 20])
    columns = cache.segments[0][1].dense().columns
    assert (columns[SCORE].sum(-1) <= 40).all() and (columns[SCORE] > 0).all()


def test_oracle_4_a_large_budget_is_full_attention():
    view = random_view(B=2, H=2, G=2, T=20, left_pad=(0, 3))
    tensors = view.queries.states, view.keys, view.values, [14, *[1] * 6], view.queries.valid
    for method in (H2O(budget=20), H2O(budget=1.0)):
        _, outs = run(method, *tensors)
        for out, expected in zip(outs, run(Full(), *tensors)[1], strict=True):
            assert torch.equal(out, expected)


def test_oracle_4_no_heavy_slots_is_a_sliding_window():
    assert kept(H2O(budget=5, recent=1.0), random_view(T=12)) == [[[7, 8, 9, 10, 11]]]


def test_no_recent_window_keeps_the_heaviest():
    assert kept(H2O(budget=2, recent=0.0), scored([0.5, 3, 0.2, 1.5, 9, 0.1])) == [[[1, 4]]]


def test_oracle_6_a_batch_of_two_equals_two_runs():
    view = random_view(B=2, H=2, G=2, T=31, left_pad=(0, 9), seed=3)
    both = kept(H2O(budget=0.3), view)
    for row in range(2):
        assert kept(H2O(budget=0.3), row_of(view, row))[0] == both[row]


@pytest.mark.parametrize(("group", "budget", "recent"), [(1, 6, 0.5), (3, 7, 0.5), (3, 8, 0.25), (2, 1, 0.5)])
def test_against_the_papers_loop(group, budget, recent):
    prompt, total = 17, 33
    view = random_view(H=2, G=group, T=total, D=16, seed=budget)
    q, k, v = view.queries.states, view.keys, view.values
    cache, outs = run(H2O(budget=budget, recent=recent), q, k, v, [prompt, *[1] * (total - prompt)])
    out = torch.cat(outs, 2)
    window = int(budget * recent)
    for head in range(2):
        heads = slice(head * group, (head + 1) * group)
        exps = (q[0, heads] @ k[0, head].T * 16**-0.5).exp()
        expected, left = slow_h2o(exps, v[0, head], budget - window, window, prompt)
        assert cache.kept()[0][head] == left
        assert_close(out[0, heads], torch.stack(expected, 1), atol=1e-4, rtol=1e-3)


def test_prompt_scores_are_the_column_sums_of_the_group():
    view = random_view(B=2, H=2, G=3, T=29, left_pad=(0, 11), seed=5)
    score = H2O().after_prefill(view).columns[SCORE]
    for row, pad in enumerate((0, 11)):
        sums = full_probabilities(view, row).sum(1).view(2, 3, -1).sum(1)
        assert_close(score[row, :, pad:], sums, atol=1e-5, rtol=1e-4)


def test_keeps_the_planted_key():
    view = plant(random_view(B=2, H=2, G=2, T=40, D=16, left_pad=(0, 8)), at=20, asked_by=slice(-10, None))
    assert all(20 - pad in head for row, pad in zip(kept(H2O(budget=6), view), (0, 8), strict=True) for head in row)


@given(st.integers(1, 24), st.integers(0, 9), st.one_of(st.integers(1, 30), st.floats(0.05, 1.0)), st.floats(0, 1))
def test_the_budget_is_exact_in_every_row_and_head(length, pad, budget, recent):
    view = random_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, 0), seed=length)
    left = kept(H2O(budget=budget, recent=recent), view)
    for row, tokens in enumerate((length, length + pad)):
        allowed = min(budget, tokens) * 2 if isinstance(budget, int) else int(budget * tokens * 2 + 1e-9)
        assert sum(map(len, left[row])) == allowed


def test_asked_by_more_than_one_head_of_the_group():
    """Two query heads of a group add up: one strong vote loses against two middling ones."""
    logits = torch.zeros(1, 1, 2, 1, 6)
    logits[0, 0, 0, 0, 1] = 3.0
    logits[0, 0, :, 0, 3] = 2.6
    assert kept(H2O(budget=1, recent=0.0), asked_view(logits)) != [[[1]]]


@pytest.mark.parametrize("options", [{"budget": 0}, {"budget": 1.5}, {"recent": -0.1}, {"recent": 1.5}])
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        H2O(**options)
