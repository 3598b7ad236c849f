"""KeyDiff against its formula: the cosine to the mean direction of a head's keys, the lowest first."""

import math

import pytest
import torch
from torch.testing import assert_close

from kvfold.methods.keydiff import KeyDiff
from kvfold.views import LayerView
from views import kept, prompt_view, random_view, row_of, top


def keyed(*rows: list[float]) -> LayerView:
    """One head with these keys."""
    keys = torch.tensor(rows)[None, None]
    return prompt_view(torch.randn_like(keys), keys, keys)


def test_oracle_1_the_odd_one_stays():
    """Directions: the mean of (1,0), (1,0), (1,0), (0,1) leans to the first three."""
    view = keyed([1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [5.0, 0.0])
    assert kept(KeyDiff(budget=1), view) == [[[2]]]
    mean = torch.tensor([0.75, 0.25])
    expected = -torch.tensor([mean[0], mean[0], mean[1], mean[0]]) / mean.norm()
    assert_close(KeyDiff().scores(view)[0, 0], expected)


def test_oracle_2_the_anchor_is_the_mean_of_directions_not_of_keys():
    """The long key alone would draw a mean of keys to itself."""
    view = keyed([0.0, 100.0], [1.0, 0.1], [1.0, 0.0], [1.0, -0.1])
    assert kept(KeyDiff(budget=1), view) == [[[0]]]


def test_oracle_3_the_newest_token_may_go_and_ties_go_to_the_earlier():
    view = keyed([1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0])
    assert kept(KeyDiff(budget=3), view) == [[[0, 1, 2]]]


def test_oracle_4_the_length_of_a_key_does_not_matter():
    view = random_view(B=2, H=2, T=30, left_pad=(0, 9))
    longer = prompt_view(
        view.queries.states, view.keys * (1 + torch.rand(2, 2, 30, 1)), view.values, view.queries.valid
    )
    assert kept(KeyDiff(budget=0.4), longer) == kept(KeyDiff(budget=0.4), view)


def slow_keydiff(view: LayerView, head: int) -> list[float]:
    """The formula in plain numbers, for a row without padding."""
    keys = view.keys[0, head].double().tolist()
    norms = [math.sqrt(sum(x * x for x in key)) for key in keys]
    mean = [sum(key[d] / norm for key, norm in zip(keys, norms, strict=True)) / len(keys) for d in range(len(keys[0]))]
    length = math.sqrt(sum(x * x for x in mean))
    return [
        -sum(a * b for a, b in zip(key, mean, strict=True)) / norm / length
        for key, norm in zip(keys, norms, strict=True)
    ]


@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_loop(seed):
    view = random_view(B=3, H=2, G=2, T=33, D=8, left_pad=(0, 6, 29), seed=seed)  # two tokens always tie
    found, left = KeyDiff().scores(view), kept(KeyDiff(budget=0.4), view)
    for row in range(3):
        alone = row_of(view, row)
        for head in range(2):
            expected = slow_keydiff(alone, head)
            assert_close(found[row, head][view.valid[row, head]], torch.tensor(expected), atol=1e-6, rtol=1e-5)
            count = int(view.budget(0.4)[row, head])
            assert left[row][head] == top(expected, count)


def test_keys_of_zero_are_no_nan():
    view = keyed([0.0, 0.0], [1.0, 0.0], [0.0, 0.0])
    assert KeyDiff().scores(view).isfinite().all()
    assert all(len(head) == 2 for head in kept(KeyDiff(budget=2), view)[0])
