"""Elastic Cache against its card: buckets by place in the text, and one fixed place where tokens go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvfold.formats import LOG_MASS
from kvfold.merges import at_home, nearest_place, over_set
from kvfold.methods._elastic import into_buckets
from kvfold.methods.elastic_cache_vlm import SCORE, ElasticCache
from kvfold.methods.full import Full
from kvfold.views import LayerView
from kvfold.views.decisions import Keep
from views import full_probabilities, kept, prompt_view, random_view, row_of, run, top


def after(method: ElasticCache, view: LayerView) -> LayerView:
    for decision in method.after_prefill(view):
        view = view.apply(decision)
    return view


def marked(size: int, *slots: int) -> torch.Tensor:
    return torch.isin(torch.arange(size), torch.tensor(slots, dtype=torch.int64)).expand(1, 1, size)


def test_oracle_1_the_nearest_anchor_takes_a_token():
    anchors = marked(8, 0, 3, 7)
    home = nearest_place(torch.arange(8).expand(1, 1, 8), ~anchors, anchors)
    assert home.tolist() == [[[0, 0, 3, 3, 3, 3, 7, 7]]]


def test_oracle_2_a_bucket_is_its_mean():
    k = torch.tensor([0.0, 2, 4, 6])[None, None, :, None]
    view = prompt_view(torch.zeros_like(k), k, -k)
    for decision in into_buckets(view, Keep(marked(4, 0, 3)), "convex"):
        view = view.apply(decision)
    assert view.keys[0, 0, [0, 3], 0].tolist() == [1, 5] and view.values[0, 0, [0, 3], 0].tolist() == [-1, -5]
    assert view.valid.tolist() == [[[True, False, False, True]]]


def test_oracle_3_one_goes_at_a_fixed_place():
    view = random_view(T=8)
    cache, _ = run(ElasticCache(budget=5, distance=2), view.queries.states, view.keys, view.values, [5, 1, 1, 1])
    assert cache.kept() == [[[0, 1, 2, 6, 7]]]
    steps = [run(ElasticCache(budget=5, distance=2), view.queries.states, view.keys, view.values, [5, *[1] * n])[0]
             for n in range(1, 3)]  # fmt: skip
    assert [step.kept()[0][0] for step in steps] == [[0, 1, 2, 4, 5], [0, 1, 2, 5, 6]]


def test_oracle_4_nothing_removed_and_equal_keys():
    view = random_view(H=2, G=2, T=20)
    q, k, v = view.queries.states, view.keys, view.values
    for budget in (1.0, 20, 99):
        _, outs = run(ElasticCache(budget=budget), q, k, v, [17, 1, 1, 1] if budget != 20 else [20])
        _, truth = run(Full(), q, k, v, [17, 1, 1, 1] if budget != 20 else [20])
        for out, expected in zip(outs, truth, strict=True):
            assert_close(out, expected)
    same = prompt_view(q, k[:, :, :1].expand_as(k).contiguous(), v)
    left = after(ElasticCache(budget=6), same)
    assert_close(left.keys[left.valid], same.keys[left.valid])
    assert not torch.allclose(left.values[left.valid], same.values[left.valid])


@given(st.integers(1, 40), st.integers(0, 9), st.integers(0, 12), st.integers(0, 5))
def test_oracle_5_every_token_is_in_one_bucket(length, pad, count, seed):
    view = random_view(B=2, H=2, T=length + pad, left_pad=(pad, 0), seed=seed)
    taking = view.valid & (torch.rand(view.valid.shape, generator=torch.Generator().manual_seed(seed)) < count / 12)
    home = nearest_place(view.positions, view.valid & ~taking, taking)
    sizes = torch.where(taking, over_set(view.valid.float(), home), 0.0).sum(-1)
    assert torch.equal(sizes, torch.where(taking.any(-1), view.count, 0).float())
    assert (home == at_home(home))[taking].all() and (home == at_home(home))[~view.valid].all()


def slow(view: LayerView, row: int, budget: int, sinks: int) -> dict[int, list[int]]:
    """The card's steps 1 to 3 for one row without padding: buckets by anchor."""
    scores = full_probabilities(view, row).mean(0).sum(0).tolist()
    total = len(scores)
    fixed = {*range(sinks), total - 1}
    anchors = top([float("inf") if i in fixed else s for i, s in enumerate(scores)], budget)
    buckets: dict[int, list[int]] = {c: [] for c in anchors}
    taking = [c for c in anchors if c not in fixed]  # as in the code
    for t in range(total):
        gaps = [abs(t - c) for c in taking]
        buckets[t if t in fixed else taking[gaps.index(min(gaps))]].append(t)
    return buckets


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("seed", range(2))
def test_against_a_loop(sinks, seed):
    view = random_view(B=2, H=2, G=2, T=44, D=4, left_pad=(0, 6), seed=seed)
    got = after(ElasticCache(budget=11, sinks=sinks), view)
    for row in range(2):
        alone, buckets = row_of(view, row), slow(view, row, 11, sinks)
        for head in range(2):
            here = got.valid[row, head]
            assert got.positions[row, head][here].tolist() == sorted(buckets)
            for slot in here.nonzero()[:, 0].tolist():
                members = buckets[int(got.positions[row, head, slot])]
                assert_close(got.keys[row, head, slot], alone.keys[0, head, members].mean(0), atol=1e-5, rtol=1e-4)
                assert_close(got.values[row, head, slot], alone.values[0, head, members].mean(0), atol=1e-5, rtol=1e-4)


def test_heads_share_their_anchors_whatever_the_remainder():
    view = random_view(H=3, G=2, T=41)
    for budget in (0.26, 0.3, 0.99):
        (row,) = kept(ElasticCache(budget=budget), view)
        assert row[0] == row[1] == row[2] and len(row[0]) == int(41 * budget)


def test_decoding_keeps_the_first_slots_and_a_window():
    view = random_view(B=2, H=2, G=2, T=60, seed=2)
    states = view.queries.states, view.keys, view.values
    start, _ = run(ElasticCache(budget=12, distance=4), *states, [40])
    cache, _ = run(ElasticCache(budget=12, distance=4), *states, [40, *[1] * 20])
    for row in range(2):
        for before, now in zip(start.kept()[row], cache.kept()[row], strict=True):
            assert now == [*before[:8], 56, 57, 58, 59]


def test_a_further_turn_adds_scores_up_and_merges_by_mass():
    view = random_view(H=2, G=2, T=30, seed=1)
    cache, _ = run(ElasticCache(budget=8, mass="counted"), view.queries.states, view.keys, view.values, [20, 10])
    tokens = cache.stored.tokens()[0]
    assert (cache.counts() == 8).all()
    assert_close(tokens.columns[LOG_MASS].exp().masked_fill(~tokens.valid, 0).sum(-1), torch.full((1, 2), 30.0))
    first = random_view(H=2, G=2, T=30, seed=1)
    before = first.column_sums().clone()
    again = first.apply(Keep(first.valid, {SCORE: torch.ones_like(before)}))
    (_, keep) = ElasticCache(budget=8).after_prefill(again)
    assert_close(keep.columns[SCORE], (before.mean(1, keepdim=True) + 1).expand_as(before))


def test_equal_tokens_side_by_side_are_merged_without_loss_when_they_are_counted():
    rng = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 3, 16, generator=rng)[:, :, torch.arange(15) // 5]
    q = torch.randn(1, 2, 18, 16, generator=rng)
    k = torch.cat([k, torch.randn(1, 1, 3, 16, generator=rng)], 2)
    scores = torch.zeros(15)
    scores[[2, 7, 12]] = 1.0

    class Given(ElasticCache):
        """The middle of each run is what the view says is important."""

        def after_prefill(self, view):
            return into_buckets(view, Keep(view.valid & (scores > 0)), self.mass)

    for mass, exact in (("counted", True), ("convex", False)):
        _, outs = run(Given(budget=99, mass=mass), q, k, k, [15, 1, 1, 1])
        _, truth = run(Full(), q, k, k, [15, 1, 1, 1])
        assert torch.allclose(outs[1], truth[1], atol=1e-5) == exact


def test_row_alone():
    view = random_view(B=2, H=2, G=2, T=30, left_pad=(0, 9))
    both = kept(ElasticCache(budget=0.4), view)
    for row in range(2):
        assert kept(ElasticCache(budget=0.4), row_of(view, row))[0] == both[row]


@pytest.mark.parametrize("options", [{"budget": 0}, {"sinks": -1}, {"distance": 0}, {"mass": "paper"}])
def test_bad_options(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ElasticCache(**options)
