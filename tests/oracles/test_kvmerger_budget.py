"""KVMerger: a slow loop written from the card, the budget in every head, layers, turns, padding."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from kvfold.formats import LOG_MASS, POSITION
from kvfold.methods.base import decided
from kvfold.methods.h2o import H2O
from kvfold.methods.kvmerger import KVMerger
from kvfold.views import LayerView
from views import full_probabilities, prompt_view, random_view, row_of, run, top


def merged(method, view: LayerView) -> LayerView:
    for decision in decided(method.after_prefill(view)):
        view = view.apply(decision)
    return view


def slow_kvmerger(
    keys: Tensor, values: Tensor, importance: list[float], budget: int, recent: int, heavy: int, threshold: float | None
) -> dict[int, tuple[Tensor, Tensor, int]]:
    """The card's algorithm for one head, scan and all: position of each slot -> (key, value, count), mass "counted"."""
    total = len(importance)
    tail = set(range(total - recent, total))
    others = [i for i in range(total) if i not in tail]
    safe = tail | {others[j] for j in top([importance[i] for i in others], heavy)}
    cosine = torch.nn.functional.cosine_similarity(keys[:-1].double(), keys[1:].double(), dim=-1).tolist()
    able = [i for i in range(total - 1) if i not in safe and i + 1 not in safe]
    best = sorted(able, key=lambda i: (-cosine[i], i))[: max(0, total - budget)]
    links = {i for i in able if i in best or (threshold is not None and cosine[i] > threshold)}
    sets = [[total - 1]]
    for i in range(total - 2, -1, -1):  # the backward scan
        sets[-1].insert(0, i) if i in links else sets.append([i])
    slots = {}
    for members in sets:
        pivot = max(members, key=lambda i: (importance[i], -i))
        distance = [float((keys[pivot] - keys[i]).norm()) for i in members]
        sigma = max(1e-6, sum(distance) / len(members) / math.sqrt(2))
        g = [math.exp(-(d**2) / (2 * sigma**2)) for d in distance]
        weight = torch.tensor([x / sum(g) for x in g])
        slots[pivot] = (weight @ keys[members], weight @ values[members], len(members))
    return slots


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize(
    ("group", "budget", "recent", "heavy"), [(1, 20, 0.1, 0.1), (3, 13, 0.08, 0.02), (2, 30, 0.0, 0.0)]
)
def test_against_a_loop(threshold, group, budget, recent, heavy):
    view = random_view(B=2, H=2, G=group, T=51, D=4, left_pad=(0, 9), seed=budget)
    after = merged(KVMerger(budget=budget, threshold=threshold, recent=recent, heavy=heavy, skip=()), view)
    for row, pad in enumerate((0, 9)):
        total = 51 - pad
        sums = full_probabilities(view, row).sum(1).view(2, group, -1).sum(1)
        for head in range(2):
            expected = slow_kvmerger(
                view.keys[row, head, pad:], view.values[row, head, pad:], sums[head].tolist(),
                budget, int(recent * total), int(heavy * total), threshold,
            )  # fmt: skip
            here = after.valid[row, head]
            assert after.positions[row, head][here].tolist() == sorted(expected)
            wanted = [expected[i] for i in sorted(expected)]
            for states, i in ((after.keys, 0), (after.values, 1)):
                assert_close(states[row, head][here], torch.stack([w[i] for w in wanted]), atol=1e-4, rtol=1e-4)
            mass = after.columns[LOG_MASS][row, head][here].exp().tolist()
            assert mass == pytest.approx([w[2] for w in wanted], rel=1e-5)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.35, 0.5, 0.9, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("threshold", [None, 0.99])
def test_the_budget_is_exact_in_every_row_and_head(budget, threshold):
    view = random_view(B=3, H=2, G=2, T=64, D=16, left_pad=(0, 13, 60), seed=1)
    after = merged(KVMerger(budget=budget, threshold=threshold, skip=()), view)
    assert torch.equal(after.count, torch.minimum(view.budget(budget), view.count))
    total = (after.columns[LOG_MASS].exp() * after.valid).sum(-1) if LOG_MASS in after.columns else view.count.float()
    assert_close(total, torch.where(after.count > 0, view.count, 0).float())


@given(
    st.integers(1, 40), st.integers(0, 20), st.one_of(st.integers(1, 40), st.floats(0.02, 1.0)),
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 9),
)  # fmt: skip
def test_the_budget_is_exact_whatever_is_protected(length, pad, budget, recent, heavy, seed):
    view = random_view(B=2, H=3, T=length + pad, left_pad=(pad, 0), seed=seed)
    after = merged(KVMerger(budget=budget, recent=recent, heavy=heavy, skip=()), view)
    assert torch.equal(after.count, torch.minimum(view.budget(budget), view.count))
    assert not (after.valid & ~view.valid).any()


def test_a_threshold_may_keep_less_than_the_budget_but_not_more():
    view = random_view(H=2, T=64, D=2, seed=5)  # in two dimensions neighbours are often alike
    loose = merged(KVMerger(budget=60, threshold=0.5, recent=0.0, heavy=0.0, skip=()), view)
    cosine = torch.nn.functional.cosine_similarity(view.keys[:, :, :-1], view.keys[:, :, 1:], dim=-1)
    assert torch.equal(loose.count, 64 - torch.maximum((cosine > 0.5).sum(-1), torch.tensor(4)))
    assert (loose.count < 60).all()


def by_layer(method: KVMerger, layers: int, length: int) -> list[LayerView]:
    paged = tuple(range(layers))
    return [
        merged(method, random_view(H=2, T=length, seed=i, layer=i, ordinal=i, paged=paged, depth=layers)) for i in paged
    ]


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.35, 0.5, 0.8, 20])
@pytest.mark.parametrize("layers", [3, 4, 12, 30])
def test_skipped_layers_count_towards_the_budget(budget, layers):
    views = by_layer(KVMerger(budget=budget), layers, 60)
    kept = [int(view.count.sum()) for view in views]
    share = budget * 60 if isinstance(budget, float) else budget
    assert sum(kept) == math.floor(share * layers * 2 + 1e-9)
    skipped, others = (kept[0], kept[1], kept[-1]), kept[2:-1]
    if layers == 3:  # all of them: nothing to give away
        assert max(kept) - min(kept) <= 2
    else:
        assert min(skipped) >= max(others)
        assert min(others) >= math.floor(0.75 * share * 2) - 1
        if layers == 30 and share >= 20:  # 30 layers have enough to spare
            assert skipped == (120, 120, 120)


def test_a_threshold_leaves_skipped_layers_alone():
    views = by_layer(KVMerger(budget=0.5, threshold=-0.5, recent=0.0, heavy=0.0), 30, 60)
    assert [int(view.count.sum()) for view in views[:2]] == [120, 120]
    assert all(int(view.count.sum()) < 60 for view in views[2:-1])


def turns(view: LayerView, chunks: list[int], method: KVMerger):
    cache, _ = run(method, view.queries.states, view.keys, view.values, chunks, view.queries.valid)
    return cache.segments[0][1].dense()


@pytest.mark.parametrize("budget", [0.35, 24, 9, 3])
def test_counts_add_over_turns_which_do_not_mix(budget):
    view = random_view(B=2, H=2, G=2, T=70, D=16, left_pad=(0, 11), seed=4)
    stored = turns(view, [40, 30], KVMerger(budget=budget, skip=()))
    mass = stored.columns[LOG_MASS].exp() * stored.valid
    assert_close(mass.sum(-1), torch.tensor([[70.0] * 2, [59.0] * 2]))
    for row, first in enumerate((40, 29)):
        old = stored.columns[POSITION][row] < first
        assert_close((mass[row] * old).sum(-1), torch.full((2,), float(first)))
    if isinstance(budget, int):
        assert (stored.valid.sum(-1) == budget).all()
    else:
        assert stored.valid.sum((1, 2)).tolist() == [int(0.35 * 140), int(0.35 * 118)]


def test_generated_tokens_are_appended_and_merge_with_the_next_turn():
    view = random_view(H=1, T=40, D=16, seed=6)
    stored = turns(view, [20, 1, 1, 1], KVMerger(budget=8, skip=()))
    assert stored.valid.sum() == 11 and stored.columns[LOG_MASS][0, 0, -3:].tolist() == [0.0] * 3
    stored = turns(view, [20, 1, 1, 1, 17], KVMerger(budget=8, skip=()))
    assert stored.valid.sum() == 8
    assert stored.columns[LOG_MASS].exp().sum() == pytest.approx(40)


def test_a_budget_of_one_token_joins_the_turns():
    view = random_view(H=2, T=30, D=16)
    stored = turns(view, [20, 10], KVMerger(budget=1, skip=()))
    assert stored.valid.sum(-1).tolist() == [[1, 1]]
    assert_close(stored.columns[LOG_MASS].exp()[0, :, 0], torch.tensor([30.0, 30.0]))


def test_equal_keys_across_the_turn_still_do_not_join():
    view = random_view(H=1, T=20, D=8, seed=7)
    keys = view.keys.clone()
    keys[:, :, 9:11] = keys[:, :, 9:10]  # the last of the first turn and the first of the second are the same
    cache, _ = run(KVMerger(budget=14, skip=()), view.queries.states, keys, view.values, [10, 10])
    stored = cache.segments[0][1].dense()
    mass = stored.columns[LOG_MASS].exp() * stored.valid
    assert (mass * (stored.columns[POSITION] < 10)).sum() == pytest.approx(10)


def test_padding_merges_with_nothing_even_when_its_key_is_the_same():
    view = random_view(B=2, H=2, T=30, D=8, left_pad=(0, 12))
    keys = view.keys.clone()
    keys[1, :, :13] = keys[1, :, 12:13]
    view = replace(view, tokens=replace(view.tokens, keys=keys))
    after = merged(KVMerger(budget=6, skip=()), view)
    assert not after.valid[1, :, :12].any()
    assert_close((after.columns[LOG_MASS].exp() * after.valid)[1].sum(-1), torch.tensor([18.0, 18.0]))


def test_a_row_of_a_batch_equals_the_row_alone_over_two_turns():
    method = KVMerger(budget=0.4, skip=())
    view = random_view(B=2, H=2, G=2, T=60, D=16, left_pad=(0, 17), seed=8)
    q, k, v = view.queries.states, view.keys, view.values
    both, _ = run(method, q, k, v, [40, 20], view.queries.valid)
    for row, pad in enumerate((0, 17)):
        one = slice(row, row + 1)
        alone, _ = run(method, q[one, :, pad:], k[one, :, pad:], v[one, :, pad:], [40 - pad, 20])
        assert both.kept()[row] == alone.kept()[0]
        stored, single = both.segments[0][1].dense(), alone.segments[0][1].dense()
        for states, other in ((stored.keys, single.keys), (stored.columns[LOG_MASS], single.columns[LOG_MASS])):
            assert_close(states[row][stored.valid[row]], other[0][single.valid[0]], atol=1e-5, rtol=1e-4)
    assert torch.equal(merged(method, row_of(view, 1)).count[0], merged(method, view).count[1])


@pytest.mark.parametrize("budget", [0.2, 7, 1])
def test_after_an_evicting_stage_the_budget_still_holds(budget):
    """Neighbours are then those side by side in what the stage before left."""
    view = random_view(B=2, H=2, G=2, T=60, D=16, left_pad=(0, 17), seed=9)
    after = merged(H2O(budget=0.5) | KVMerger(budget=budget, skip=()), view)
    assert torch.equal(after.count, view.budget(budget))
    assert_close((after.columns[LOG_MASS].exp() * after.valid).sum(-1), view.budget(0.5).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sums_in_float32(dtype):
    view = random_view(H=2, T=64, D=16, dtype=dtype, seed=3)
    exact = replace(view, tokens=replace(view.tokens, keys=view.keys.float(), values=view.values.float()))
    queries = replace(view.queries, states=view.queries.states.float())
    half, full = (merged(KVMerger(budget=0.2, skip=()), v) for v in (view, replace(exact, queries=queries)))
    assert torch.equal(half.valid, full.valid)
    assert torch.equal(half.keys[half.valid], full.keys[full.valid].to(dtype))
    assert_close(half.columns[LOG_MASS], full.columns[LOG_MASS])


@pytest.mark.parametrize("budget", [2, 3, 9, 10, 25])
@pytest.mark.parametrize(("recent", "heavy"), [(0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (0.1, 0.5)])
def test_protection_leaves_room_for_the_end_of_a_turn(budget, recent, heavy):
    view = random_view(B=2, H=2, T=70, D=16, left_pad=(0, 11), seed=4)
    stored = turns(view, [40, 30], KVMerger(budget=budget, recent=recent, heavy=heavy, skip=()))
    mass = stored.columns[LOG_MASS].exp() * stored.valid
    assert (stored.valid.sum(-1) == budget).all()
    for row, first in enumerate((40, 29)):
        old = stored.columns[POSITION][row] < first
        assert_close((mass[row] * old).sum(-1), torch.full((2,), float(first)))


def test_padding_inside_the_prompt_is_nobodys_neighbour():
    view = random_view(B=1, H=2, G=2, T=40, D=16, seed=2)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, [0, 7, 8, 20, 39]] = False
    view = prompt_view(view.queries.states, view.keys, view.values, mask)
    after, alone = (merged(KVMerger(budget=0.3, skip=()), v) for v in (view, row_of(view, 0)))
    for head in range(2):
        here, there = after.valid[0, head], alone.valid[0, head]
        assert torch.equal(after.positions[0, head][here], alone.positions[0, head][there])
        assert_close(after.keys[0, head][here], alone.keys[0, head][there], atol=1e-5, rtol=1e-4)
