"""Ada-KV against its card: heads compete, a part is shared evenly, and the sum is exact."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvfold.methods.adakv import AdaKV, round_to
from kvfold.methods.snapkv import SnapKV
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from views import asked_view, full_probabilities, kept, random_view, row_of, top

A, B = [0.9, 0.8, 0.7, 0.1], [0.6, 0.2, 0.1, 0.05]
OWN = "snapkv(window=4, kernel=1)"


def voted(*heads: list[float], scale: float = 4.0) -> LayerView:
    """One query, which gives the tokens before its own `heads[h]` / `scale`, and itself the rest."""
    logits = []
    for votes in heads:
        share = torch.tensor(votes) / scale
        logits.append(torch.cat([share, 1 - share.sum(0, keepdim=True)]).log())
    return asked_view(torch.stack(logits)[None, :, None, None], 1)


def split(view: LayerView, budget: int = 3, **options: object) -> list[int]:
    """Tokens of each head, the window of one not counted."""
    method = AdaKV(budget=budget, score="snapkv(window=1, kernel=1)", **options)
    return [len(head) - 1 for head in kept(method, view)[0]]


def test_oracle_1_a_blend_of_competition_and_even_shares():
    view = voted(A, B)
    assert split(view, floor=0.0) == [3, 1]
    assert split(view, floor=0.5) == [2, 2]
    assert split(view, floor=0.2) == [3, 1]  # the official code keeps (2, 1)


def test_oracle_3_even_where_heads_are_equal_or_the_floor_is_all():
    assert split(voted(A, A), floor=0.0) == split(voted(A, B), floor=1.0) == [2, 2]


def test_oracle_4_more_weight_is_retained_than_with_even_shares():
    view = voted(A, B)
    weights = torch.tensor([A, B])

    def retained(floor: float) -> float:
        left = kept(AdaKV(budget=3, score="snapkv(window=1, kernel=1)", floor=floor), view)[0]
        return sum(float(weights[h, j]) for h in range(2) for j in left[h] if j < 4)

    assert retained(0.0) == pytest.approx(3.0) and retained(1.0) == pytest.approx(2.5)


def test_oracle_6_scale_moves_the_budget_but_not_the_order():
    quiet = voted(A, [b / 4 for b in B])
    loud = voted([a / 10 for a in A], B)
    assert split(quiet, floor=0.0) == [3, 1] and split(loud, floor=0.0) == [1, 3]
    for view in (quiet, loud):
        left = kept(AdaKV(budget=3, score="snapkv(window=1, kernel=1)", floor=0.0), view)[0]
        assert all(head[:-1] == list(range(len(head) - 1)) for head in left)


def test_normalize_weighs_heads_by_what_their_best_hold():
    # Head sums 2.5 and .95, best two 1.7 and .8: .68 [.9 .8 .7 .1] against .842 [.6 .2 .1 .05].
    assert split(voted(A, [0.6, 0.5, 0.1, 0.05]), floor=0.0) == [3, 1]
    flat = [0.45, 0.45, 0.45, 0.45]
    assert split(voted(flat, [0.85, 0.4, 0.0001, 0.0001]), floor=0.0) == [3, 1]
    assert split(voted(flat, [0.85, 0.4, 0.0001, 0.0001]), floor=0.0, normalize=True) == [2, 2]


def slow(view: LayerView, row: int, each: list[int], floor: float) -> list[list[int]]:
    """The card for one row: SnapKV's votes of a window of 4 without pooling, then steps 3 to 5 by sorting."""
    group = view.queries.states.shape[1] // view.heads
    probs = full_probabilities(view, row)
    total = probs.shape[-1]
    heads = probs.view(view.heads, group, total, total)[:, :, -4:, : total - 4].sum(2).mean(1).tolist()
    free = [max(0, c - 4) for c in each]
    pool = sorted(((-s, h, j) for h, votes in enumerate(heads) for j, s in enumerate(votes)))[: sum(free)]
    wanted = [sum(h == head for _, h, _ in pool) for head in range(view.heads)]
    blend = [n * (1 - floor) + c * floor for n, c in zip(wanted, free, strict=True)]
    counts = [round(x) for x in blend]
    while (missing := sum(free) - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        worst = max(range(view.heads), key=lambda h: (sign * (round(blend[h] - counts[h], 6)), -sign * h))
        counts[worst] += sign
    return [[*top(heads[h], counts[h]), *range(total - 4, total)] for h in range(view.heads)]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(floor, seed):
    view = random_view(B=2, H=3, G=2, T=50, D=16, left_pad=(0, 11), seed=seed)
    left = kept(AdaKV(budget=14, score=OWN, floor=floor), view)
    for row in range(2):
        assert left[row] == slow(view, row, [14] * 3, floor)
        assert kept(AdaKV(budget=14, score=OWN, floor=floor), row_of(view, row))[0] == left[row]


def numbers(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_rounding_is_mended_where_it_takes_and_where_it_gives():
    shares = numbers([2.5, 1.5], [1.4, 1.6], [0.4, 0.4], [0.6, 0.6], [1.5, 2.5])
    rounded = round_to(shares, torch.tensor([4, 3, 1, 1, 4]))
    assert rounded.tolist() == [[2, 2], [1, 2], [1, 0], [1, 0], [2, 2]]


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6), st.floats(0, 1))
def test_rounding_keeps_the_sum(wanted, floor):
    even = sum(wanted) / len(wanted)
    shares = numbers([n * (1 - floor) + even * floor for n in wanted])
    (found,) = round_to(shares, torch.tensor([sum(wanted)])).tolist()
    assert sum(found) == sum(wanted)
    assert all(abs(n - x) < 1 + 1e-5 for n, x in zip(found, shares[0].tolist(), strict=True))


@given(st.integers(1, 30), st.integers(1, 40), st.sampled_from(["snapkv", "h2o", "tova", OWN]))
def test_the_layer_keeps_what_it_may(length, budget, score):
    view = random_view(B=2, H=3, G=2, T=40, left_pad=(40 - length, 0), seed=length)
    left = kept(AdaKV(budget=budget, score=score), view)
    for row, tokens in enumerate((length, 40)):
        assert sum(map(len, left[row])) == 3 * min(budget, tokens)
        assert score == "tova" or all(head[-1] == tokens - 1 for head in left[row])


def test_heads_that_hold_little_leave_their_part_to_the_others():
    """As on a further turn: one head has 6 tokens left, the others take what it can't use."""
    view = random_view(H=3, T=40)
    thin = torch.ones(1, 3, 40, dtype=torch.bool)
    thin[0, 1, 3:37] = False
    left = kept(AdaKV(budget=20, score=OWN), view.apply(Keep(thin)))[0]
    assert sum(map(len, left)) == 60 and len(left[1]) <= 6


def test_over_a_pyramid():
    view = random_view(H=2, T=60, seed=4)
    inner = f'pyramidkv(score="{OWN}", beta=4.0)'
    sizes = []
    for ordinal in range(3):
        place = replace(view.place, ordinal=ordinal, paged=(0, 1, 2), step={})
        left = kept(AdaKV(budget=15, score=inner, floor=0.0), replace(view, place=place))[0]
        sizes.append(sum(map(len, left)))
    assert sizes[0] > sizes[1] > sizes[2] and sum(sizes) == 2 * 3 * 15
    assert kept(AdaKV(budget=15, score=OWN, floor=1.0), view) == kept(SnapKV(budget=15, window=4, kernel=1), view)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"floor": 1.5}, "floor=1.5"), ({"budget": 0}, "budget=0"), ({"score": "full"}, "score='full'")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdaKV(**options)


@pytest.mark.parametrize("budget", [1, 2, 0.25])
def test_sinks_of_the_score_come_out_of_the_budget(budget):
    view = random_view(B=2, H=2, G=2, T=12)
    held = [len(head) for row in kept(AdaKV(budget=budget, score="expected-attention"), view) for head in row]
    allowed = budget if isinstance(budget, int) else 3
    assert sum(held[:2]) == sum(held[2:]) == 2 * allowed


@pytest.mark.parametrize("score", ["scissorhands", "mpcache", "cake", "kvcrush", "kvzip", "windowkv"])
def test_methods_that_are_more_than_a_ranking_are_refused(score):
    with pytest.raises(ValueError, match=rf"score='{score}' (decides by itself in|must be a method that ranks)"):
        AdaKV(score=score)
