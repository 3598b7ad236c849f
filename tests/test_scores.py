"""From scores to kept tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.scores import keep_top, smooth, top_mask
from kvfold.views.decisions import Keep
from views import random_view

VOTES = [6.0, 1, 2, 0, 5, 3, 0, 0]


def line(values: list[float]) -> torch.Tensor:
    return torch.tensor([[values]], dtype=torch.float32)


def chosen(values: list[float], count: int) -> list[int]:
    return top_mask(line(values), torch.tensor([[count]]))[0, 0].nonzero()[:, 0].tolist()


def test_smooth_gives_the_figures_of_the_snapkv_card():
    expected = line([7 / 3, 3, 1, 7 / 3, 8 / 3, 8 / 3, 1, 0])
    assert_close(smooth(line(VOTES), 3), expected)
    assert smooth(line(VOTES), 3, "max").tolist() == [[[6, 6, 2, 5, 5, 5, 3, 0]]]
    assert torch.equal(smooth(line(VOTES), 1), line(VOTES))
    assert smooth(line([2.0]), 5).tolist() == [[[pytest.approx(0.4)]]]  # zeros beyond both ends count


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=20), st.sampled_from([1, 3, 5, 7]))
def test_smooth_against_a_loop(values, kernel):
    half = kernel // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    assert_close(smooth(line(values), kernel), line([sum(x) / kernel for x in around]), atol=1e-5, rtol=1e-5)
    assert_close(smooth(line(values), kernel, "max"), line([max(x) for x in around]), atol=0, rtol=0)


def test_ties_go_to_the_earlier_token():
    assert chosen([1, 3, 3, 3, 2], 2) == [1, 2]
    assert chosen([0.0] * 300, 7) == list(range(7))
    assert chosen([-0.0, 0.0, -0.0], 2) == [0, 1]
    assert chosen([torch.inf, 1, torch.inf, torch.inf], 2) == [0, 2]


def test_minus_infinity_is_never_chosen():
    assert chosen([-torch.inf, -5, -torch.inf, -9], 3) == [1, 3]
    assert chosen([-torch.inf] * 4, 3) == []
    assert chosen([1, 2], 9) == [0, 1] and chosen([1, 2], 0) == []


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(0, 31), st.integers(0, 31))
def test_top_mask_against_sorting_for_each_head_on_its_own(values, one, other):
    scores = torch.tensor([[values, values[::-1]]]).float()
    mask = top_mask(scores, torch.tensor([[one, other]]))
    for head, count in enumerate((one, other)):
        row = scores[0, head].tolist()
        expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        assert mask[0, head].nonzero()[:, 0].tolist() == sorted(expected)


def test_forced_tokens_come_first_and_count():
    view = random_view(T=6)
    scores = line([9.0, 8, 7, 6, 5, 4])
    forced = torch.tensor([[[False, False, False, True, False, True]]])

    def left(count: int) -> list[int]:
        decision = keep_top(view, scores, torch.tensor([[count]]), always=forced)
        assert isinstance(decision, Keep)
        return decision.mask[0, 0].nonzero()[:, 0].tolist()

    assert [left(n) for n in range(5)] == [[], [3], [3, 5], [0, 3, 5], [0, 1, 3, 5]]


def test_empty_slots_are_never_kept_however_high_their_score_or_forced():
    view = random_view(B=2, T=6, left_pad=(0, 3))
    scores = torch.full((2, 1, 6), 1.0)
    scores[..., :3] = 99.0
    decision = keep_top(view, scores, torch.tensor([[4], [4]]), always=torch.ones(2, 1, 6, dtype=torch.bool))
    assert decision.mask[:, 0].tolist() == [[True] * 4 + [False] * 2, [False] * 3 + [True] * 3]


def test_pack_and_unpack():
    view = random_view(B=2, H=2, T=6, D=4, left_pad=(0, 2))
    view = view.apply(Keep(torch.tensor([True, False, True, True, False, True]).expand(2, 2, 6).clone()))
    packed = view.pack(view.positions)
    assert packed[0, 0, :4].tolist() == [0, 2, 3, 5] and packed[1, 1, :3].tolist() == [0, 1, 3]
    for x in (view.positions, view.keys, view.valid):
        assert torch.equal(view.unpack(view.pack(x)), x)


def test_what_is_no_number_is_ranked_and_never_empties_a_head():
    """What always stays first, then what overflowed, numbers, and -inf and NaN last; ties to the earlier."""
    view = random_view(T=6)
    nan, inf = float("nan"), float("inf")
    scores, always = torch.tensor([[[nan, inf, 1.0, -inf, 2.0, 0.0]]]), torch.tensor([[[False] * 5 + [True]]])
    order = [5, 1, 4, 2, 0, 3]
    for count in range(7):
        kept = keep_top(view, scores, torch.tensor([[count]]), always).mask[0, 0].nonzero()[:, 0].tolist()
        assert kept == sorted(order[:count])
