"""Keyformer against its card: H2O whose score is a softmax with Gumbel noise and a growing temperature."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from kvfold.methods import keyformer as module
from kvfold.methods.h2o import H2O
from kvfold.methods.keyformer import SCORE, Keyformer
from kvfold.scores import rows
from kvfold.scores.noise import crossed, gumbel, hashed
from kvfold.views import LayerView
from views import full_probabilities, kept, random_view, row_of, run, top


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(module, "gumbel", lambda bits: torch.zeros(bits.shape))


def decoded(method, chunks, **options):
    view = random_view(D=16, **options)
    cache, outs = run(method, view.queries.states, view.keys, view.values, chunks, view.queries.valid)
    return cache.kept(), torch.cat(outs, 2)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(("budget", "recent"), [(6, 0.5), (9, 0.3), (0.4, 0.3)])
def test_oracle_1_without_noise_and_temperature_it_is_h2o(budget, recent):
    ours = Keyformer(budget=budget, recent=recent, tau_delta=0.0)
    for chunks in ([30], [20, *[1] * 10], [11, 9, 1, 9]):
        kept_sets, out = decoded(ours, chunks, H=2, G=3, T=30, B=2, left_pad=(0, 4))
        same, h2o = decoded(H2O(budget=budget, recent=recent), chunks, H=2, G=3, T=30, B=2, left_pad=(0, 4))
        assert kept_sets == same
        assert_close(out, h2o)


@pytest.mark.parametrize(("tokens", "budget", "recent", "heavy"), [(100, 0.6, 18, 42), (7, 0.6, 1, 3)])
def test_oracle_2_the_parts_of_the_budget(tokens, budget, recent, heavy):
    view, method = random_view(T=tokens), Keyformer(budget=budget)
    (left,) = kept(method, view)[0]
    assert len(left) == recent + heavy
    assert method.always(view, view.budget(budget)).sum() == recent
    assert left[-recent:] == list(range(tokens - recent, tokens))


def test_oracle_3_the_scores_of_a_head_sum_to_the_queries():
    view = random_view(B=2, H=2, G=3, T=33, left_pad=(0, 7))
    score = Keyformer().after_prefill(view).columns[SCORE]
    assert_close(score.sum(-1), torch.tensor([[33.0] * 2, [26.0] * 2]))
    assert (score[1, :, :7] == 0).all()


def test_oracle_4_the_seed_decides_what_is_kept_and_not_what_a_prompt_gives():
    sets, outs = zip(
        *(decoded(Keyformer(budget=8, seed=seed), [40], H=2, G=2, T=40) for seed in (0, 0, 1, 2**40)), strict=True
    )
    assert sets[0] == sets[1] and sets[0] != sets[2] != sets[3]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_oracle_4_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    Keyformer().after_prefill(random_view(T=20))
    torch.testing.assert_close(torch.random.get_rng_state(), before)


def test_oracle_5_gumbel_max():
    keys = hashed(torch.arange(2))
    draws = gumbel(crossed(hashed(torch.arange(40_000)[:, None], 7), keys))
    won = (draws[:, 0] + 2.0 > draws[:, 1]).float().mean()
    assert abs(won - math.e**2 / (math.e**2 + 1)) < 0.005


def test_the_noise_is_a_standard_gumbel_and_has_no_pattern():
    of_query = hashed(torch.arange(1500)[:, None], 0, 3, torch.tensor(1))
    noise = gumbel(crossed(of_query, hashed(torch.arange(1500)))).double()
    assert noise.isfinite().all() and noise.dtype == torch.float64
    assert abs(noise.mean() - 0.57722) < 0.005 and abs(noise.var() - math.pi**2 / 6) < 0.01
    centred = noise - noise.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1)), centred.T):
        mask = torch.ones_like(centred).triu(1).bool()
        assert abs((centred * other)[mask].mean()) < 0.01
    # Neither the mean of a query nor that of a key stands out.
    for axis in (0, 1):
        assert abs(noise.mean(axis).var() * 1500 / noise.var() - 1) < 0.15
    other_head = gumbel(crossed(hashed(torch.arange(1500)[:, None], 0, 3, torch.tensor(2)), hashed(torch.arange(1500))))
    assert abs((centred * (other_head - other_head.mean())).mean()) < 0.01


def test_oracle_6_a_budget_of_the_prompt_evicts_only_while_decoding():
    view = random_view(T=22)
    tensors = view.queries.states, view.keys, view.values
    for budget, counts in ((20, [20, 20, 20]), (1.0, [20, 21, 22])):
        for steps, count in enumerate(counts):
            cache, _ = run(Keyformer(budget=budget), *tensors, [20, *[1] * steps])
            assert (cache.counts() == count).all()


def test_the_temperature_grows_to_its_end():
    view, method = random_view(B=2, T=5), Keyformer(tau_init=1.0, tau_end=1.5, tau_delta=0.2)
    for steps, expected in ((0, 1.0), (2, 1.4), (3, 1.5)):
        place = replace(view.place, seen=view.place.prompt + steps)
        assert_close(method.tau(replace(view, place=place)), torch.full((2,), expected))


def noise_at(seed: int, layer: int, head: int, asked: int, key: int) -> float:
    of_query = hashed(torch.tensor(asked), seed, layer, head)
    return float(gumbel(crossed(of_query, hashed(torch.tensor(key)))))


def slow_scores(view: LayerView, row: int, head: int, method: Keyformer) -> list[float]:
    """Step 2 of the card, one query and one key at a time."""
    group = view.queries.states.shape[1] // view.heads
    logits = full_probabilities(view, row).log()
    total = logits.shape[-1]
    f = [0.0] * total
    for g in range(head * group, (head + 1) * group):
        for i in range(total):
            noisy = [float(logits[g, i, j]) + noise_at(method.seed, view.place.layer, g, i, j) for j in range(i + 1)]
            weights = torch.tensor(noisy).div(method.tau_init).softmax(0).tolist()
            f = [score + (weights[j] / group if j <= i else 0.0) for j, score in enumerate(f)]
    return f


@pytest.mark.parametrize(("budget", "tau"), [(9, 1.0), (5, 1.7)])
def test_against_a_loop(budget, tau):
    view = random_view(B=2, H=2, G=2, T=21, D=16, left_pad=(0, 6), seed=budget, layer=2)
    method = Keyformer(budget=budget, tau_init=tau, seed=11)
    decision = method.after_prefill(view)
    left, recent = kept(method, view), int(budget * 0.3)
    for row, pad in enumerate((0, 6)):
        for head in range(2):
            f = slow_scores(view, row, head, method)
            assert_close(decision.columns[SCORE][row, head, pad:], torch.tensor(f), atol=1e-4, rtol=1e-4)
            heavy = top(f[: len(f) - recent], budget - recent)
            assert left[row][head] == heavy + list(range(len(f) - recent, len(f)))


def test_blocks_and_batches_change_nothing(monkeypatch):
    view = random_view(B=2, H=2, G=2, T=150, left_pad=(0, 9), seed=3)
    method = Keyformer(budget=20)
    expected = kept(method, view)
    for row in range(2):
        assert kept(method, row_of(view, row))[0] == expected[row]
    monkeypatch.setattr(rows, "BLOCK_ELEMENTS", 7 * 2 * 4 * 150)
    assert kept(method, view) == expected


def test_a_generated_token_scores_as_it_would_at_the_end_of_a_prompt():
    """The step's own kernel leaves its attention; noise and score are those of the same query read as a prompt."""
    view = random_view(H=2, G=2, T=25, D=16)
    tensors = view.queries.states, view.keys, view.values
    one, other = (
        run(Keyformer(budget=1.0, tau_delta=0.0), *tensors, chunks)[0].stored.tokens()[0].columns[SCORE]
        for chunks in ([25], [20, 1, 1, 3])
    )
    assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"budget": 0}, {"recent": 1.5}, {"tau_init": 0.0}, {"tau_end": 0.5}, {"tau_delta": -0.1}, {"seed": -1}],
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        Keyformer(**options)
