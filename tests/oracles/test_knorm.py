"""L2 norms against their formula: the lowest norm stays."""

import math

import pytest
import torch
from torch.testing import assert_close

from kvfold.methods.knorm import KNorm
from kvfold.views import LayerView
from views import kept, prompt_view, random_view, row_of, top


def keyed(*rows: list[float]) -> LayerView:
    """One head with these keys."""
    keys = torch.tensor(rows)[None, None]
    return prompt_view(torch.randn_like(keys), keys, keys)


def test_oracle_1_the_lowest_norms_stay():
    view = keyed([3.0, 4.0], [0.0, 1.0], [-2.0, 0.0], [6.0, 8.0])
    assert_close(KNorm().scores(view)[0, 0], -torch.tensor([5.0, 1.0, 2.0, 10.0]))
    assert kept(KNorm(budget=2), view) == [[[1, 2]]]
    assert kept(KNorm(budget=3), view) == [[[0, 1, 2]]]


def test_oracle_2_ties_go_to_the_earlier_and_the_newest_may_go():
    assert kept(KNorm(budget=2), keyed([0.0, 1.0], [1.0, 0.0], [-1.0, 0.0])) == [[[0, 1]]]


def test_oracle_3_direction_does_not_matter():
    view = random_view(B=2, H=2, T=30, left_pad=(0, 9))
    turned = prompt_view(view.queries.states, view.keys.flip(-1).neg(), view.values, view.queries.valid)
    assert kept(KNorm(budget=0.4), turned) == kept(KNorm(budget=0.4), view)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_a_loop(dtype):
    """In float32 whatever the dtype: in bfloat16 norms would tie."""
    view = random_view(B=3, H=2, G=2, T=33, D=8, left_pad=(0, 6, 31), dtype=dtype)
    left = kept(KNorm(budget=0.4), view)
    for row in range(3):
        alone = row_of(view, row)
        for head in range(2):
            expected = [-math.sqrt(sum(x * x for x in key)) for key in alone.keys[0, head].double().tolist()]
            assert left[row][head] == top(expected, int(view.budget(0.4)[row, head]))
