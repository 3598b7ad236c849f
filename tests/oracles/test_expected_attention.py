"""Expected Attention against its card: Gaussian queries of the future, and the lengths of values."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.methods.expected_attention import ExpectedAttention
from kvfold.scores import expected
from kvfold.scores.expected import expected_attention, future_queries, mean_rotation
from kvfold.views import LayerView
from views import kept, prompt_view, random_view, row_of, top


@dataclass(frozen=True)
class Turns:
    """RoPE in halves, as most models have it."""

    base: float = 100.0

    def shift(self, x, steps):
        d = x.shape[-1]
        angles = steps[..., None].float() * self.base ** -(torch.arange(d // 2) * 2 / d)
        a, b = x[..., : d // 2].float(), x[..., d // 2 :].float()
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1).to(x.dtype)


def turned_view(**options) -> LayerView:
    view = random_view(**options)
    return replace(view, place=replace(view.place, rope=Turns()))


def moments(view: LayerView, row: int, head: int, future: int, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps 1 and 2 of the card for one query head of one row, with matrices of rotation."""
    alone, rope = row_of(view, row), Turns()
    q = alone.queries.states[:, head : head + 1]
    total, d = q.shape[2], q.shape[-1]
    before = rope.shift(q, -torch.arange(total)[None, None])[0, 0, skip:]
    mean = before.mean(0)
    covariance = sum((torch.outer(x - mean, x - mean) for x in before), torch.zeros(d, d)) / max(1, total - skip)
    turn = torch.zeros(d, d)
    for p in range(total, total + future):
        columns = [rope.shift(unit[None, None, None], torch.tensor([[[p]]]))[0, 0, 0] for unit in torch.eye(d)]
        turn += torch.stack(columns, 1) / future
    return turn @ mean, turn @ covariance @ turn.T


def slow_scores(view: LayerView, row: int, head: int, method: ExpectedAttention) -> list[float]:
    """The card, key by key, for one KV head of one row without its padding; sinks have no score."""
    alone, s = row_of(view, row), method.sinks
    group, scale = view.queries.states.shape[1] // view.heads, view.place.scale
    keys, values = alone.keys[0, head, s:], alone.values[0, head, s:]
    total = torch.zeros(len(keys))
    for g in range(head * group, (head + 1) * group):
        mean, covariance = moments(view, row, g, method.future, s)
        z = [float(mean @ k) * scale + float(k @ covariance @ k) * scale**2 / 2 for k in keys]
        total += torch.tensor(z).softmax(0) / group
    return [(float(a) + method.epsilon) * float(v.norm()) for a, v in zip(total, values, strict=True)]


@pytest.mark.parametrize(("budget", "future", "sinks", "epsilon"), [(13, 9, 4, 0.0), (8, 1, 0, 0.02), (20, 30, 2, 1.0)])
def test_against_a_loop(budget, future, sinks, epsilon):
    view = turned_view(B=2, H=2, G=3, T=31, D=8, left_pad=(0, 7), seed=budget)
    method = ExpectedAttention(budget=budget, future=future, sinks=sinks, epsilon=epsilon)
    left, scores = kept(method, view), method.scores(view)
    for row, pad in enumerate((0, 7)):
        for head in range(2):
            slow = slow_scores(view, row, head, method)
            assert_close(scores[row, head, pad + sinks :], torch.tensor(slow), atol=1e-5, rtol=1e-4)
            assert left[row][head] == list(range(sinks)) + [sinks + j for j in top(slow, budget - sinks)]


def test_oracle_1_the_closed_form_is_the_mean_of_many_queries():
    rng = torch.Generator().manual_seed(3)
    mean, root, k = (torch.randn(*shape, generator=rng) * 0.5 for shape in ((4,), (4, 4), (4,)))
    drawn = torch.randn(2_000_000, 4, generator=rng) @ root.T + mean
    expected_mean = (drawn @ k / 2).exp().double().mean()
    z = mean @ k / 2 + k @ (root @ root.T) @ k / 8
    assert abs(expected_mean / z.exp() - 1) < 2e-3
    view = prompt_view(torch.zeros(1, 1, 2, 4), torch.stack([k, torch.zeros(4)])[None, None], torch.zeros(1, 1, 2, 4))
    got = expected_attention(view, mean.view(1, 1, 1, 4), (root @ root.T).view(1, 1, 1, 4, 4), view.valid)
    assert_close(got[0, 0, 0, 0] / got[0, 0, 0, 1], z.exp())


def test_oracle_2_equal_queries_rank_like_the_next_one():
    view = turned_view(T=20, D=8)
    q = torch.randn(8, generator=torch.Generator().manual_seed(1)).expand(1, 1, 20, 8)
    at = torch.arange(20)[None, None]
    values = torch.nn.functional.normalize(view.values, dim=-1)
    view = replace(
        prompt_view(Turns().shift(q, at), view.keys, values), place=replace(view.place, prompt=torch.tensor([20]))
    )
    one = Turns().shift(q[:, :, :1], torch.tensor([[[20]]]))
    weights = (view.keys @ one.mT)[0, 0, :, 0] * view.place.scale
    method = ExpectedAttention(budget=6, future=1, sinks=0)
    assert kept(method, view)[0][0] == top(weights.tolist(), 6)
    assert_close(method.scores(view)[0, 0], weights.softmax(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_oracle_3_a_value_of_twice_the_length_scores_twice(epsilon):
    view = turned_view(H=2, G=2, T=20)
    values = view.values.clone()
    values[:, :, 9] *= 2
    other = replace(view, tokens=replace(view.tokens, values=values))
    method = ExpectedAttention(epsilon=epsilon)
    factor = torch.ones(20)
    factor[9] = 2
    assert_close(method.scores(other), method.scores(view) * factor)


def test_oracle_4_a_large_epsilon_ranks_by_values_alone():
    view = turned_view(H=2, T=30)
    left = kept(ExpectedAttention(budget=10, epsilon=1e6, sinks=0), view)
    for head in range(2):
        assert left[0][head] == top(view.values[0, head].norm(dim=-1).tolist(), 10)


def test_oracle_5_without_keys_everyone_gets_the_same():
    view = random_view(B=2, T=12, left_pad=(0, 3))
    view = prompt_view(view.queries.states, torch.zeros_like(view.keys), view.values, view.queries.valid)
    found = expected_attention(view, *future_queries(view, 512, 4), view.valid)
    assert_close(found[0], torch.full_like(found[0], 1 / 12))
    assert_close(found[1, ..., 3:], torch.full_like(found[1, ..., 3:], 1 / 9))


def test_without_rope_queries_count_as_they_stand():
    view = random_view(H=2, G=2, T=12)
    mean, covariance = future_queries(view, 512, 4)
    q = view.queries.states[0, :, 4:]
    assert_close(mean.view(4, -1), q.mean(1))
    assert_close(covariance.view(4, 8, 8), torch.stack([x.T.cov(correction=0) for x in q]), atol=1e-5, rtol=1e-4)


def test_oracle_6_the_mean_rotation_forgets_high_frequencies():
    for future in (1, 7, 512):
        turn = mean_rotation(Turns(), future, 8, torch.device("cpu"))
        for i, theta in enumerate(100.0 ** -(torch.arange(4) * 2 / 8)):
            modulus = math.hypot(turn[i, i], turn[i + 4, i])
            bound = abs(math.sin(future * theta / 2) / (future * math.sin(theta / 2)))
            assert abs(modulus - bound) < 1e-4
            assert_close(turn[i, i + 4], -turn[i + 4, i])
        if future == 512:
            assert math.hypot(turn[0, 0], turn[4, 0]) < 0.005


@pytest.mark.parametrize(("budget", "count"), [(1.0, 100), (1 - 0.7, 30), (0.1, 10), (9, 9)])
def test_oracle_7_how_many_stay(budget, count):
    assert [len(head) for head in kept(ExpectedAttention(budget=budget), turned_view(H=3, T=100))[0]] == [count] * 3


def test_large_keys_are_taken_in_blocks(monkeypatch):
    view = turned_view(B=2, H=2, G=2, T=40, left_pad=(0, 5))
    whole = ExpectedAttention().scores(view)
    monkeypatch.setattr(expected, "BLOCK_TOKENS", 7)
    assert_close(ExpectedAttention().scores(view), whole)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_queries_are_turned_in_blocks(monkeypatch, size):
    """No more than a block of them in float32 at once, and in blocks they have the same moments."""
    view = turned_view(B=2, H=2, G=2, T=40, left_pad=(0, 15), seed=2)
    q = view.queries.states + 30.0 * torch.randn(1, 4, 1, 8)  # far from zero: sums of squares would lose digits
    view = replace(view, queries=replace(view.queries, states=q))
    whole = future_queries(view, 9, 4)
    turned = []

    class Watched(Turns):
        def shift(self, x, steps):
            turned.append(x.shape[2])
            return super().shift(x, steps)

    monkeypatch.setattr(expected, "BLOCK_QUERIES", size)
    blocked = future_queries(replace(view, place=replace(view.place, rope=Watched(), step={})), 9, 4)
    for ours, theirs in zip(blocked, whole, strict=True):
        assert_close(ours, theirs, atol=2e-3, rtol=1e-4)
    assert max(turned[:-1]) <= size  # the last is the mean rotation


def test_layers_of_a_pass_share_the_mean_rotation(monkeypatch):
    calls, step = [], {}
    monkeypatch.setattr(expected, "mean_rotation", lambda *args: calls.append(args) or mean_rotation(*args))
    for ordinal in range(3):
        view = turned_view(H=2, T=20, ordinal=ordinal, paged=(0, 1, 2), step=step)
        ExpectedAttention().after_prefill(view)
    assert len(calls) == 1


@given(st.integers(1, 24), st.integers(0, 9), st.one_of(st.integers(1, 30), st.floats(0.05, 1.0)), st.integers(0, 6))
def test_the_budget_is_exact_and_the_sinks_stay(length, pad, budget, sinks):
    view = turned_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, 0), seed=length)
    left = kept(ExpectedAttention(budget=budget, sinks=sinks, future=5), view)
    for row, tokens in enumerate((length, length + pad)):
        allowed = min(budget, tokens) * 2 if isinstance(budget, int) else int(budget * tokens * 2 + 1e-9)
        assert sum(map(len, left[row])) == allowed
        for head in left[row]:
            assert head[:sinks] == list(range(min(len(head), sinks)))


def test_row_alone():
    view = turned_view(B=2, H=2, G=2, T=33, left_pad=(5, 0), seed=8)
    method = ExpectedAttention(budget=0.4)
    for row in range(2):
        alone = row_of(view, row)
        assert kept(method, replace(alone, place=replace(alone.place, rope=Turns())))[0] == kept(method, view)[row]


@pytest.mark.parametrize("options", [{"future": 0}, {"sinks": -1}, {"epsilon": -0.1}, {"budget": 0}])
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ExpectedAttention(**options)
