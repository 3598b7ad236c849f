"""HeadKV against its card: the shares of heads, the tokens that SnapKV picks, the scores of the calibration."""

from dataclasses import replace

import pytest
import torch

from kvfold.calibration.heads import copy_score, reason_score, semantic_score
from kvfold.calibration.questions import NeedleQuestion
from kvfold.methods.headkv import HeadKV, Shares
from kvfold.methods.snapkv import SnapKV
from views import full_probabilities, kept, random_view, row_of, top


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(1.5, [168, 136, 104, 72]), (1.005, [191, 144, 96, 49]), (10.0, [127, 122, 118, 113])],
)
def test_oracle_1_budgets(beta, expected):
    shares = Shares(((0.4, 0.3, 0.2, 0.1),), 4, window=8, beta=beta)(128.0)[0]
    assert [round(share - 8) for share in shares] == expected
    assert sum(shares) == pytest.approx(4 * 128)


@pytest.mark.parametrize("beta", [1.5, 1e6])
def test_oracle_2_and_3_even_scores_or_no_pool_are_snapkv(beta):
    view = random_view(B=2, H=2, G=3, T=60, D=16, left_pad=(0, 20))
    heads = ((0.5,) * 6,) if beta == 1.5 else ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6),)
    expected = kept(SnapKV(budget=20, window=8, kernel=7, pool="max"), view)
    assert kept(HeadKV(budget=20, beta=beta, heads=heads), view) == expected


def test_a_head_without_score_keeps_floor_and_window():
    assert Shares(((1.0, 0.0),), 2, 8, 1.5)(128.0) == ((8 + 40 + 160.0, 8 + 40.0),)


def test_oracle_4_a_group_has_the_mean_of_its_scores():
    """Capacities [8 4 6 2 | 12 2 4 6] with G = 4 are 5 and 6: beta 1 makes them the scores."""
    scores = ((8.0, 4.0, 6.0, 2.0, 12.0, 2.0, 4.0, 6.0),)
    assert Shares(scores, 2, window=0, beta=1.0)(5.0)[0] == pytest.approx((50 / 11, 60 / 11))


def slow(view, row, head, each, heads, window=8, kernel=7, beta=1.5):
    """The card for one head of one row, no share above the prompt."""
    group = view.queries.states.shape[1] // view.heads
    probs = full_probabilities(view, row)
    total = probs.shape[-1]
    base = each - window
    mean = [sum(heads[h * group : (h + 1) * group]) for h in range(view.heads)]
    pool = (base // beta) * view.heads
    keep = int(mean[head] / sum(mean) * pool + base - base // beta + 1e-9)
    votes = probs[head * group : (head + 1) * group, total - window :, : total - window].sum(1).mean(0).tolist()
    half = kernel // 2
    pooled = [max(votes[max(0, i - half) : i + half + 1]) for i in range(len(votes))]
    return keep, top(pooled, keep) + list(range(total - window, total)), top(pooled, keep + 1)


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed):
    view = random_view(B=2, H=3, G=2, T=80, D=16, left_pad=(0, 12), seed=seed)
    heads = tuple(torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist())
    left = kept(HeadKV(budget=26, heads=(heads,)), view)
    for row, found in enumerate(left):
        assert sum(map(len, found)) == 3 * 26
        for head in range(3):
            count, tokens, more = slow(view, row, head, 26, heads)
            assert len(found[head]) in (count + 8, count + 9)  # the last tokens go to the largest remainders
            assert found[head] == (tokens if len(found[head]) == count + 8 else more + tokens[count:])


def test_row_alone_and_what_a_short_prompt_leaves_over():
    view = random_view(B=2, H=2, G=2, T=40, D=16, left_pad=(0, 25))
    method = HeadKV(budget=14, beta=1.005, heads=((0.9, 0.8, 0.05, 0.05),))
    rows = kept(method, view)
    assert [len(head) for head in rows[1]] == [15, 13]  # 15 tokens are all there are: the other head has the rest
    for row in range(2):
        assert kept(method, row_of(view, row))[0] == rows[row]


ASKED = NeedleQuestion(torch.tensor([[9, 8, 7, 5, 6, 7, 1, 2]]), [5, 3, 7], (3, 6))
"""A needle 5 6 7 at 3, 4, 5; the model recites 5, 3, 7, reading ten tokens in all."""


def rows(*spans: list[float]) -> torch.Tensor:
    """Attention of three steps in one head; what is not given to the needle is at token 0."""
    found = torch.zeros(1, 3, 10)
    for step, span in enumerate(spans):
        found[0, step, 3:6] = torch.tensor(span)
        found[0, step, 0] = 1 - sum(span)
    return found


def test_copy_score_wants_the_token_that_is_said():
    assert copy_score(rows([0.8, 0, 0], [0, 0.8, 0], [0, 0, 0.8]), ASKED).tolist() == pytest.approx([2 / 3])
    assert copy_score(rows([0, 0.8, 0], [0, 0, 0], [0, 0, 0.2]), ASKED).tolist() == [0.0]


def test_reason_score_adds_attention_to_the_right_sentence():
    assert reason_score(rows([0.3, 0.2, 0.1], [0, 0, 0], [0.5, 0, 0]), ASKED).tolist() == pytest.approx([1.0 / 3])


def test_semantic_score_is_the_card_of_compresskv():
    """Steps one and three say a token of the needle, step two does not."""
    assert semantic_score(rows([0.2, 0.2, 0.1], [0.3, 0.3, 0.3], [0.4, 0.4, 0.1]), ASKED).tolist() == pytest.approx(
        [1.4]
    )


@pytest.mark.parametrize(
    "options",
    [{"window": -1}, {"beta": 0.5}, {"table": "random"}, {"heads": ((),)}, {"score": "full"}, {"budget": 0.0}],
)
def test_bad_options(options, unchecked):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"{name}="):
        HeadKV(**options)


def test_the_window_is_that_of_the_score():
    view, table = random_view(H=2, G=2, T=60), ((1.0, 1.0, 3.0, 3.0),)
    for score, window in (("snapkv(window=16, kernel=3)", 16), ("h2o", 0)):
        own = HeadKV(budget=24, score=score, heads=table)
        assert kept(own, view) == kept(replace(own, window=window), view)
    with pytest.raises(ValueError, match=r"window=8 must be that of score='snapkv', 32; None takes it"):
        HeadKV(score="snapkv", window=8)


@pytest.mark.parametrize("score", ["adakv", "pyramidkv(beta=2.0)", "headkv"])
def test_scores_that_share_by_themselves_are_refused(score):
    with pytest.raises(ValueError, match=r"shares the budget by itself, which headkv would not heed"):
        HeadKV(score=score)


def test_without_scores_it_names_the_command():
    with pytest.raises(ValueError, match="kvfold calibrate headkv --model"):
        HeadKV(budget=4).after_prefill(random_view(H=2))
