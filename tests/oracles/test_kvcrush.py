"""KVCrush against its card: representatives of the evicted tokens, by how alike the heads behave towards them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.methods import parse
from kvfold.methods.kvcrush import ANCHORS, KVCrush, representatives
from kvfold.scores import top_mask
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from views import kept, random_view, row_of, run, spared, top

FOUR = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool().T[None]  # A, B, C, D: 1 H P


def from_anchor(anchor: str, bits: torch.Tensor = FOUR) -> list[int]:
    """Hamming distance of each token's bits to the anchor."""
    return (bits != KVCrush(anchor=anchor).anchor_bits(bits.shape[1], 0)).sum(1)[0].tolist()


def chosen(distance: list[int], count: int, among: list[bool] | None = None) -> list[int]:
    among = among or [True] * len(distance)
    mask = representatives(torch.tensor([[distance]]), torch.tensor([[among]]), torch.tensor([[count]]))
    return mask[0, 0].nonzero()[:, 0].tolist()


def test_oracle_1_both_ends_of_the_order_stay():
    assert from_anchor("zeros") == [1, 2, 3, 4]
    assert chosen([1, 2, 3, 4], 2) == [0, 3]


def test_oracle_2_other_anchors():
    assert from_anchor("ones") == [3, 2, 1, 0]
    assert from_anchor("alternating") == [1, 2, 1, 2]
    # in the stable order A C B D
    assert [chosen([1, 2, 1, 2], n) for n in (1, 2, 3)] == [[0], [0, 3], [0, 1, 3]]


def test_oracle_3_half_of_the_middle_has_ones():
    for tokens in (8, 9, 1):
        view, method = random_view(H=3, T=tokens), KVCrush(anchor="zeros")
        scores = torch.zeros(1, 3, tokens)
        distance = method.distance(view, scores, view.valid)
        assert distance[0, 0].tolist() == [3] * (tokens // 2) + [0] * (tokens - tokens // 2)


@pytest.mark.parametrize("score", ["snapkv(window=4)", "h2o", "tova"])
def test_oracle_4_without_a_share_it_is_the_base_method(score):
    view = random_view(B=2, H=2, G=2, T=40, D=16, left_pad=(0, 9))
    base = replace(parse(score), budget=12)
    assert kept(KVCrush(budget=12, score=score, share=0.0), view) == kept(base, view)
    tensors = view.queries.states, view.keys, view.values, [30, *[1] * 10], view.queries.valid
    (one, _), (other, _) = run(KVCrush(budget=12, score=score, share=0.0), *tensors), run(base, *tensors)
    assert one.kept() == other.kept()


def test_oracle_4_nothing_goes_when_there_is_room_for_all():
    view = random_view(H=2, T=20)
    assert kept(KVCrush(budget=20, share=1.0), view) == [[list(range(20))] * 2]
    assert chosen([3, 1, 2], 3) == chosen([3, 1, 2], 7) == [0, 1, 2]
    assert chosen([3, 1, 2], 7, [True, False, True]) == [0, 2] and chosen([3, 1, 2], 0) == []


def test_oracle_6_the_majority_would_be_zeros():
    """Half of the tokens have ones in each head, rounded down: never more than half. So there is no "mean"."""
    view = random_view(H=3, T=9)
    upper = top_mask(torch.rand(1, 3, 9), view.count // 2)
    assert not (2 * upper.sum(-1) > 9).any()
    with pytest.raises(ValueError, match="anchor='mean' must be one of 'random', 'zeros', 'ones', 'alternating'"):
        KVCrush(anchor="mean")


def test_every_anchor_is_another_choice():
    view = random_view(H=3, T=60, seed=2)
    method = KVCrush(budget=20, share=0.5, score="snapkv(window=4)")
    sets = [kept(replace(method, anchor=anchor), view) for anchor in ("zeros", "ones", "alternating")]
    assert sets[0] != sets[1] != sets[2] != sets[0] and kept(method, view) == sets[2]


def slow_kvcrush(view: LayerView, row: int, method: KVCrush, budget: int) -> list[list[int]]:
    """The card, token by token, for one row without its padding; SnapKV scores."""
    alone = row_of(view, row)
    scores, total = method.inner.scores(alone)[0].tolist(), alone.valid.shape[-1]
    if len(ends := spared(total, budget, method.inner.window)) == budget:
        return [ends] * len(scores)
    window = method.inner.window
    middle = total - window
    bits = [top(head[:middle], middle // 2) for head in scores]
    anchor = {"zeros": [0, 0, 0], "ones": [1, 1, 1], "alternating": [0, 1, 0]}[method.anchor]
    delta = [sum((t in bits[h]) != bool(anchor[h]) for h in range(len(scores))) for t in range(middle)]
    share = int((budget - window) * method.share)
    left = []
    for head in scores:
        best = top(head[:middle], budget - window - share)
        gone = sorted((t for t in range(middle) if t not in best), key=lambda t: (delta[t], t))
        n = min(share, len(gone))
        picks = [gone[int(i * (len(gone) - 1) / max(1, n - 1) + 0.5)] for i in range(n)]
        assert len(set(picks)) == n
        left.append(sorted([*best, *picks, *range(middle, total)]))
    return left


@pytest.mark.parametrize("anchor", ["zeros", "ones", "alternating"])
@pytest.mark.parametrize(("budget", "share"), [(20, 0.25), (14, 0.5), (12, 1.0), (4, 0.5)])
def test_against_a_loop(anchor, budget, share):
    view = random_view(B=2, H=3, G=2, T=41, D=16, left_pad=(0, 9), seed=budget)
    method = KVCrush(budget=budget, share=share, anchor=anchor, score="snapkv(window=5, kernel=3)")
    for row in range(2):
        assert kept(method, view)[row] == slow_kvcrush(view, row, method, budget)


def test_heads_meet_at_text_positions():
    """An earlier stage left each head other tokens: what a head does not hold, it would not keep."""
    view = random_view(H=2, T=12)
    gone = torch.zeros(1, 2, 12, dtype=torch.bool)
    gone[0, 0, :6] = True
    thin = view.apply(Keep(~gone))
    packed = replace(thin, tokens=thin.tokens.take(thin._packed))  # as it lies in the cache
    scores = torch.arange(12.0).expand(1, 2, 12)
    for one in (thin, packed):
        distance = KVCrush(anchor="zeros").distance(one, scores.gather(2, one.positions.long()), one.valid)
        by_place = {int(p): int(d) for p, d in zip(one.positions[0, 1], distance[0, 1], strict=True)}
        assert by_place == {p: (p >= 6) + (p >= 9) for p in range(12)}


@pytest.mark.parametrize("score", ["snapkv(window=4)", "h2o"])
@given(
    st.integers(1, 24), st.integers(0, 9), st.one_of(st.integers(1, 30), st.floats(0.05, 1.0)), st.floats(0, 1),
    st.sampled_from(ANCHORS),
)  # fmt: skip
def test_oracle_5_the_budget_is_exact_in_every_row_and_head(score, length, pad, budget, share, anchor):
    view = random_view(B=2, H=2, G=2, T=length + pad, left_pad=(pad, 0), seed=length)
    left = kept(KVCrush(budget=budget, share=share, anchor=anchor, score=score), view)
    for row, tokens in enumerate((length, length + pad)):
        allowed = min(budget, tokens) * 2 if isinstance(budget, int) else int(budget * tokens * 2 + 1e-9)
        assert sum(map(len, left[row])) == allowed


def test_random_anchors_come_from_the_seed():
    view = random_view(H=8, T=60, seed=1)
    sets = [kept(KVCrush(budget=20, anchor="random", score="snapkv(window=4)", seed=seed), view) for seed in (0, 0, 5)]
    assert sets[0] == sets[1] != sets[2]
    bits = [KVCrush(anchor="random").anchor_bits(500, layer) for layer in (0, 1)]
    assert 200 < bits[0].sum() < 300 and 200 < (bits[0] ^ bits[1]).sum() < 300


@pytest.mark.parametrize("score", ["snapkv(window=4)", "h2o"])
def test_row_alone(score):
    view = random_view(B=2, H=2, G=2, T=43, D=16, left_pad=(5, 0), seed=8)
    method = KVCrush(budget=0.4, share=0.4, score=score)
    for row in range(2):
        assert kept(method, row_of(view, row))[0] == kept(method, view)[row]
    tensors = view.queries.states, view.keys, view.values
    both, _ = run(method, *tensors, [30, 3, *[1] * 10], view.queries.valid)
    alone, _ = run(method, *(x[:1, :, 5:] for x in tensors), [25, 3, *[1] * 10])
    assert both.kept()[0] == alone.kept()[0]


def test_it_acts_when_its_base_method_does():
    assert KVCrush(score="h2o").listens("after_decode") and not KVCrush().listens("after_decode")


@pytest.mark.parametrize(
    "options", [{"share": 1.5}, {"anchor": "ends"}, {"seed": -1}, {"budget": 0}, {"score": "full"}]
)
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        KVCrush(**options)
