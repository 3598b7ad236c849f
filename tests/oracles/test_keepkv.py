"""KeepKV against its card: the answer to the query in hand does not change, and equal tokens cost nothing."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold import ops
from kvfold.formats import LOG_MASS
from kvfold.merges import nearest
from kvfold.methods.base import decided
from kvfold.methods.full import Full
from kvfold.methods.h2o import H2O
from kvfold.methods.keepkv import SCORE, KeepKV
from kvfold.scores.exponents import log_exponents
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from views import kept, prompt_view, random_view, run

NOW = {"window": 1, "alpha": 0.0}


def merged(method: KeepKV, view: LayerView, mask: Tensor) -> LayerView:
    for decision in decided(method.merged(view, Keep(mask))):
        view = view.apply(decision)
    return view


def answer(view: LayerView, q: Tensor) -> Tensor:
    """What queries (B, Hq, Q, D) get of a view's tokens, masses counted."""
    b, hq, n, d = q.shape
    grouped = q.view(b, view.heads, -1, d)
    bias = view.columns.get(LOG_MASS, torch.zeros(view.valid.shape)).masked_fill(~view.valid, -torch.inf)
    out, _ = ops.attend(grouped, view.keys, view.values, view.place.scale, bias[:, :, None])
    return out.reshape(b, hq, n, -1)


def three() -> LayerView:
    keys = torch.tensor([math.log(2), math.log(4), 0.0])[None, None, :, None]
    values = torch.tensor([1.0, 4.0, 0.0])[None, None, :, None]
    return prompt_view(torch.ones_like(keys), keys, values, scale=1.0)


ONE = torch.ones(1, 1, 1, 1)


def test_oracle_1_the_answer_stays():
    view = three()
    assert answer(view, ONE).item() == pytest.approx(18 / 7)
    mask = torch.tensor([[[False, True, True]]])
    after = merged(KeepKV(**NOW), view, mask)
    assert after.keys[0, 0, 1].item() == pytest.approx(math.log(3))
    assert after.values[0, 0, 1].item() == pytest.approx(3.0)
    assert after.columns[LOG_MASS][0, 0].exp().tolist() == pytest.approx([1, 2, 1])
    assert answer(after, ONE).item() == pytest.approx(18 / 7)
    votes = merged(KeepKV(mode="votes", **NOW), view, mask)
    assert votes.keys[0, 0, 1].item() == pytest.approx(1.155245, abs=1e-6)
    assert answer(votes, ONE).item() == pytest.approx(2.591815, abs=1e-5)
    bare = votes.apply(Keep(votes.valid, {LOG_MASS: torch.zeros(1, 1, 3)}))
    assert answer(bare, ONE).item() == pytest.approx(2.281403, abs=1e-5)
    assert answer(view.apply(Keep(mask)), ONE).item() == pytest.approx(3.2)
    bias = merged(KeepKV(mode="bias", **NOW), view, mask)
    assert answer(bias, ONE).item() == pytest.approx(18 / 7)
    assert bias.keys[0, 0, 1].item() == pytest.approx(1.155245, abs=1e-6)


def test_oracle_2_a_chain_keeps_the_mass():
    after = merged(KeepKV(**NOW), three(), torch.tensor([[[False, True, True]]]))
    last = merged(KeepKV(similar=-1.0, **NOW), after, torch.tensor([[[False, True, False]]]))
    assert last.keys[0, 0, 1].item() == pytest.approx(math.log(7 / 3))
    assert last.values[0, 0, 1].item() == pytest.approx(18 / 7)
    assert last.columns[LOG_MASS][0, 0, 1].exp().item() == pytest.approx(3.0)
    assert (last.columns[LOG_MASS] + last.columns[SCORE])[0, 0, 1].exp().item() == pytest.approx(7.0)


def pairs(seed: int, total: int = 40, kinds: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of two heads, and keys and values that come from a few kinds of tokens."""
    rng = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(1, 2, kinds, 16, generator=rng)[:, :, torch.arange(total) % kinds] for _ in range(2))
    return torch.randn(1, 4, total, 16, generator=rng), k, v


@pytest.mark.parametrize("mode", ["zip", "votes", "bias"])
@given(seed=st.integers(0, 99))
def test_oracle_3_equal_tokens_are_merged_without_loss(mode, seed):
    q, k, v = pairs(seed)
    chunks = [24, *[1] * 12, 4]
    method = KeepKV(mode=mode, budget=14, score="streamingllm(sinks=6)", similar=0.999, **NOW)
    cache, outs = run(method, q, k, v, chunks)
    assert (cache.counts() == 14).all()
    for out, expected in zip(outs, run(Full(), q, k, v, chunks)[1], strict=True):
        assert_close(out, expected, atol=1e-5, rtol=1e-4)
    tokens = cache.stored.tokens()[0]
    mass = tokens.columns[LOG_MASS].exp().masked_fill(~tokens.valid, 0.0)  # there may be holes
    assert_close(mass.sum(-1), torch.full((1, 2), 40.0))


def test_oracle_4_votes_are_tokens_less_those_that_were_lost():
    view = random_view(B=2, H=2, G=2, T=60, D=2, left_pad=(0, 9), seed=5)
    method = KeepKV(mode="votes", budget=20, similar=0.9)
    mask = H2O(budget=20).after_prefill(view).mask
    lost = (nearest(view.valid & ~mask, mask, view.keys)[1] <= 0.9) & view.valid & ~mask
    after = merged(method, view, mask)
    votes = after.columns[LOG_MASS].exp().masked_fill(~after.valid, 0.0).sum(-1)
    assert_close(votes, (view.count - lost.sum(-1)).float(), atol=1e-3, rtol=0)
    assert (votes < view.count).any() and (votes > 20).any()


def test_oracle_4_a_threshold_out_of_reach_is_the_base_policy():
    view = random_view(B=2, H=2, G=2, T=40, left_pad=(0, 5))
    method, base = KeepKV(budget=9, similar=1.1), H2O(budget=9)
    assert kept(method, view) == kept(base, view)
    tensors = view.queries.states, view.keys, view.values, [24, *[1] * 16], view.queries.valid
    for out, expected in zip(run(method, *tensors)[1], run(base, *tensors)[1], strict=True):
        assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["zip", "bias"])
@pytest.mark.parametrize("stretch", [2.0, 1e9])
def test_oracle_5_the_current_answer_is_kept_whatever_the_keys(mode, stretch):
    view = random_view(B=2, H=3, T=50, D=16, left_pad=(0, 12), seed=7)
    mask = (view.rank % 3 == 0) & view.valid
    after = merged(KeepKV(mode=mode, similar=-1.0, stretch=stretch, **NOW), view, mask)
    assert (after.valid.sum(-1) == mask.sum(-1)).all()
    now = view.queries.states[:, :, -1:]
    atol = 1e-5 if stretch == 2.0 or mode == "bias" else 1e-3  # keys that were scaled far round more
    assert_close(answer(after, now), answer(view, now), atol=atol, rtol=1e-4)
    other = torch.randn(now.shape, generator=torch.Generator().manual_seed(1))
    assert (answer(after, other) - answer(view, other)).abs().max() > 0.05


def test_votes_alone_do_not_keep_it():
    view = random_view(H=2, T=50, D=16, seed=7)
    after = merged(KeepKV(mode="votes", similar=-1.0, **NOW), view, (view.rank % 3 == 0) & view.valid)
    now = view.queries.states[:, :, -1:]
    assert (answer(after, now) - answer(view, now)).abs().max() > 0.01


def test_merging_beats_dropping():
    """On keys that come in families, later answers are nearer to the full cache's than eviction's."""
    rng = torch.Generator().manual_seed(3)
    kinds = torch.randn(12, 16, generator=rng)
    k = (kinds[torch.randint(12, (80,), generator=rng)] + 0.1 * torch.randn(80, 16, generator=rng))[None, None]
    v = torch.randn(1, 1, 80, 16, generator=rng)
    view = prompt_view(torch.randn(1, 2, 80, 16, generator=rng), k, v)
    later = torch.randn(1, 2, 20, 16, generator=rng)
    truth = answer(view, later)
    drop = H2O(budget=20).after_prefill(view)
    lost = (answer(view.apply(drop), later) - truth).norm()
    for mode in ("zip", "votes", "bias"):
        assert (answer(merged(KeepKV(mode=mode, budget=20), view, drop.mask), later) - truth).norm() < 0.8 * lost


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_scores_against_a_loop(decay):
    view = random_view(B=2, H=2, G=2, T=19, left_pad=(0, 8), seed=2)
    found, asked = log_exponents(view, 4, decay)
    for row, pad in enumerate((0, 8)):
        for head in range(2):
            q = view.queries.states[row, 2 * head : 2 * head + 2]
            for j in range(pad, 19):
                seen = [i for i in range(15, 19) if i >= j]
                terms = [float((q[:, i] @ view.keys[row, head, j] * view.place.scale).exp().mean()) for i in seen]
                weights = [decay ** (18 - i) for i in seen]
                mean = sum(w * x for w, x in zip(weights, terms, strict=True)) / sum(weights)
                assert found[row, head, j].item() == pytest.approx(math.log(mean), abs=1e-5)
                assert asked[row, head, j] == len(seen)


def test_estimates_are_a_moving_mean():
    """Token by token: S <- alpha S + (1 - alpha) s, over 1 - alpha^age."""
    view = random_view(T=9, seed=3)
    cache, _ = run(KeepKV(budget=30, alpha=0.8), view.queries.states, view.keys, view.values, [1] * 9)
    column = cache.stored.tokens()[0].columns[SCORE][0, 0].exp()
    logits = (view.queries.states[0, 0] @ view.keys[0, 0].T * view.place.scale).exp()
    for j in range(9):
        total = sum(0.2 * 0.8 ** (8 - i) * float(logits[i, j]) for i in range(j, 9))
        assert column[j].item() == pytest.approx(total / (1 - 0.8 ** (9 - j)), rel=1e-4)


def test_large_logits_do_not_overflow():
    view = random_view(H=2, T=30, D=8)
    big = prompt_view(40 * view.queries.states, 10 * view.keys, view.values)
    after = merged(KeepKV(similar=-1.0), big, big.rank % 2 == 1)
    assert after.keys.isfinite().all() and after.values.isfinite().all()
    assert after.columns[LOG_MASS].isfinite().all() and after.columns[SCORE].isfinite().all()


def test_padding_may_hold_anything():
    """Also where a row is shorter than the window, so that some of its queries are none."""
    view = random_view(B=2, H=2, G=2, T=30, D=4, left_pad=(0, 22), seed=3)
    holes, nobody = ~view.valid[..., None], ~view.queries.valid[:, None, :, None]
    queries = replace(view.queries, states=view.queries.states.masked_fill(nobody, torch.nan))
    poisoned = replace(view, tokens=replace(view.tokens, keys=view.keys.masked_fill(holes, torch.nan)), queries=queries)
    for ours, clean in zip(log_exponents(poisoned, 16, 0.5), log_exponents(view, 16, 0.5), strict=True):
        assert torch.equal(ours[view.valid], clean[view.valid]) and bool(ours[view.valid].isfinite().all())


def test_acts_when_the_method_that_selects_does():
    assert KeepKV().listens("after_decode") and not KeepKV(score="snapkv").listens("after_decode")
    assert KeepKV(score="snapkv(window=8)", budget=9).inner.window == 8
    assert replace(KeepKV(), score="streamingllm(positions='compact')").compact


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sum"}, {"similar": -2.0}, {"window": 0}, {"alpha": 1.0}, {"stretch": 0.5}, {"score": "full"},
        {"score": "kvmerger"}, {"score": "snapkv(budget=0.5)"}, {"score": "kvzip"}, {"score": "h2o | snapkv"},
    ],
)  # fmt: skip
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError) as error:
        KeepKV(**options)
    assert f"{name}={value!r}" in str(error.value)
