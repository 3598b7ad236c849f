"""CompressKV against its card: layer budgets, the chosen heads' votes, one set for all heads of a layer."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.methods.compresskv import CompressKV, layer_budgets
from kvfold.views.decisions import Keep
from views import full_probabilities, kept, random_view, row_of, top


@pytest.mark.parametrize(
    ("errors", "mean", "expected"),
    [
        ((0.4, 0.3, 0.2, 0.1), 64, (83, 70, 58, 45)),
        ((0.97, 0.01, 0.01, 0.01), 64, (157, 33, 33, 33)),
        ((1.0, 0.0, 0.0, 0.0), 32, (32, 32, 32, 32)),
        ((1.0, 0.0, 0.0, 0.0), 100, (300, 34, 33, 33)),
    ],
)
def test_oracle_1_layer_budgets(errors, mean, expected):
    assert layer_budgets(mean, 10_000, errors, 32) == expected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(0, 200), st.integers(0, 300), st.integers(1, 64))
def test_oracle_2_the_sum_is_the_budget(errors, mean, more, least):
    found = layer_budgets(mean, mean + more, tuple(errors), least)
    assert sum(found) == mean * len(errors)
    assert all(min(least, mean) <= each <= min(3 * mean, mean + more) for each in found)


def slow(view, row, budget, chosen, window=8, kernel=5):
    """The card, step by step, for one row without its padding."""
    probs = full_probabilities(view, row)
    total = probs.shape[-1]
    scores = [0.0] * (total - window)
    for head in chosen:
        votes = probs[head, total - window :, : total - window].sum(0).tolist()
        for i in range(len(votes)):
            around = [votes[j] for j in range(i - kernel // 2, i + kernel // 2 + 1) if 0 <= j < len(votes)]
            scores[i] += sum(around) / kernel / len(chosen)
    return top(scores, budget - window) + list(range(total - window, total))


@pytest.mark.parametrize(("first", "seed"), [(1, 0), (2, 1), (4, 2), (6, 3)])
def test_against_a_loop(first, seed):
    view = random_view(B=2, H=2, G=3, T=50, D=16, left_pad=(0, 17), seed=seed)
    heads = torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist()
    method = CompressKV(budget=20, first=first, heads=(tuple(heads),), errors=(1.0,))
    chosen = sorted(range(6), key=lambda head: -heads[head])[:first]
    for row in range(2):
        assert kept(method, view)[row] == [slow(view, row, 20, chosen)] * 2  # oracle 4: all heads the same
        assert kept(method, row_of(view, row))[0] == kept(method, view)[row]


def test_heads_that_hold_other_tokens_meet_at_text_positions():
    """As on a further turn: each head has dropped other tokens, so that its slots are other places of the text."""
    view = random_view(H=2, G=2, T=50, D=16, seed=5)
    gone = torch.zeros(1, 2, 50, dtype=torch.bool)
    gone[0, 0, 3:19] = gone[0, 1, 12:27] = True
    thin = view.apply(Keep(~gone))
    packed = replace(thin, tokens=thin.tokens.take(thin._packed))  # as it lies in the cache
    method = CompressKV(budget=20, first=3, kernel=1, heads=((0.9, 0.1, 0.8, 0.7),), errors=(1.0,))
    received, expected = thin.attention(8).sum(3)[0], torch.zeros(50)  # H G T
    for place in range(42):
        votes = [float(received[h, g, place]) for h, g in ((0, 0), (1, 0), (1, 1)) if not gone[0, h, place]]
        expected[place] = sum(votes) / max(1, len(votes))
    for one in (thin, packed):
        scores = method.scores(one)
        for head in range(2):
            here = one.valid[0, head]
            torch.testing.assert_close(scores[0, head, here], expected[one.positions[0, head, here].long()])


def test_oracle_3_more_heads_than_there_are_is_all_of_them():
    view = random_view(H=2, G=2, T=50, D=16)
    few, many = (CompressKV(budget=20, first=n, heads=((0.1, 0.2, 0.3, 0.4),), errors=(1.0,)) for n in (4, 99))
    assert kept(few, view) == kept(many, view)


def test_oracle_6_nothing_goes_when_there_is_room():
    view = random_view(B=2, H=2, T=30, left_pad=(0, 9))
    for budget in (30, 1.0):
        method = CompressKV(budget=budget, heads=((0.1, 0.2),), errors=(1.0,))
        assert kept(method, view) == [[list(range(30))] * 2, [list(range(21))] * 2]


def test_layers_share_by_error():
    heads = ((0.1, 0.2),) * 2
    for ordinal, expected in ((0, 15), (1, 5)):
        view = random_view(H=2, T=60, layer=ordinal, ordinal=ordinal, paged=(0, 1), depth=2)
        method = CompressKV(budget=10, least=4, window=2, heads=heads, errors=(0.9, 0.1))
        assert [len(head) for head in kept(method, view)[0]] == [expected] * 2


@pytest.mark.parametrize("options", [{"window": 0}, {"kernel": 4}, {"first": 0}, {"least": 0}, {"heads": ()}])
def test_bad_options(options, unchecked):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"{name}="):
        CompressKV(**options)


def test_numbers_of_another_model():
    view = random_view(H=2, T=20)
    with pytest.raises(ValueError, match="kvfold calibrate compresskv --model"):
        CompressKV(budget=4).after_prefill(view)
    with pytest.raises(ValueError, match=r"errors=\(0.5, 0.5\) of compresskv must be 1 numbers"):
        CompressKV(budget=4, heads=((0.1, 0.2),), errors=(0.5, 0.5)).after_prefill(view)
