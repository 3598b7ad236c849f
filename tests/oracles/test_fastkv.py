"""FastKV against its card: SnapKV's sets summed over a group, and what goes on behind the middle layer."""

import pytest
import torch

import kvfold
from kvfold.methods.base import decided
from kvfold.methods.fastkv import FastKV
from kvfold.scores import smooth
from kvfold.views.decisions import Keep, Propagate
from models import build, feed, follow, subject, tokens
from views import asked_view, kept, random_view, spared


def going_on(method: FastKV, view) -> list[list[int]]:
    """Columns that go on."""
    mask = next(d.mask for d in decided(method.after_prefill(view)) if isinstance(d, Propagate))
    return [row.nonzero()[:, 0].tolist() for row in mask]


def test_by_default_fewer_go_on_than_came_and_more_than_are_kept():
    view = random_view(H=2, T=200)
    assert (len(going_on(FastKV(), view)[0]), len(kept(FastKV(), view)[0][0])) == (40, 20)


def test_the_first_tokens_go_on_where_few_do():
    view = random_view(H=2, T=40)
    assert going_on(FastKV(propagated=10, budget=10), view) == [spared(40, 10, 8)] == [[0, 1, 2, 3, *range(34, 40)]]


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_scores_are_the_loops(pool):
    """Sum over the window's queries, pool each query head, then sum over the group."""
    view = random_view(B=2, H=2, G=3, T=20, left_pad=(0, 4), seed=3)
    method = FastKV(window=4, kernel=5, pool=pool)
    found, every = method.scores(view), view.attention(4)
    for row, pad in enumerate((0, 4)):
        for head in range(2):
            expected = torch.zeros(20 - pad)
            for g in range(3):
                votes = every[row, head, g, :, pad:].sum(0)
                votes[-4:] = 0.0
                expected += smooth(votes[None, None], 5, pool)[0, 0]
            torch.testing.assert_close(found[row, head, pad:-4], expected[:-4])


def test_oracle_the_cards_example():
    """T = 10, w = 2, N = 5, pooled scores after the head sum [.9 .1 .2 .1 .8 .1 .1 .3]: 0, 4, 7 and the window."""
    votes = torch.tensor([0.9, 0.1, 0.2, 0.1, 0.8, 0.1, 0.1, 0.3]) / 8
    rows = torch.cat([votes, torch.full((2,), 1e-9)]).repeat(2, 1)
    rows[0, 8], rows[1, 9] = 1 - votes.sum(), 1 - votes.sum()
    view = asked_view(rows.log()[None, None, None], 2)
    assert going_on(FastKV(budget=3, propagated=5, window=2, kernel=1), view) == [[0, 4, 7, 8, 9]]


def test_oracle_a_thousand_tokens():
    """tau = .2, rho = .1, l* = 1 of 3: layers 0 and 1 keep 100 of 1000, layer 2 sees 200 and keeps 100."""
    model = build("llama")
    model.config.max_position_embeddings = 2048
    ids = tokens(1000)["input_ids"]
    cache = kvfold.Cache(model, "fastkv(budget=0.1, propagated=0.2, layer=1)")
    seen = {}
    with torch.no_grad(), cache.observed(lambda view: seen.__setitem__(view.place.layer, view.new)):
        model(ids, past_key_values=cache)
    assert seen == {0: 1000, 1: 1000, 2: 200}
    assert [core.counts().tolist() for core in cache.paged] == [[[100, 100]]] * 3
    positions = cache.kept(2)[0][0]
    assert positions[-8:] == list(range(992, 1000)) and positions[0] < 200  # those of the text, not 0 to 199


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_oracle_all_kept_is_full_attention(name):
    prompt = tokens(40, 23)
    forced = torch.arange(5, 13).view(2, 4)
    ours = follow(subject(name), kvfold.Cache(subject(name), FastKV(budget=1.0)), *prompt.values(), forced)
    full = follow(subject(name), kvfold.Cache(subject(name), "full"), *prompt.values(), forced)
    torch.testing.assert_close(ours, full, atol=1e-4, rtol=0)


def test_oracle_layers_before_the_cut_are_the_full_models():
    model, prompt = subject("llama"), tokens(60)
    keys = {}
    for method in ("full", "fastkv(layer=1, budget=0.25)"):
        cache, here = kvfold.Cache(model, method), {}
        with cache.observed(lambda view, here=here: here.__setitem__(view.place.layer, view.keys)):
            feed(model, cache, *prompt.values())
        keys[method] = here
    for layer in (0, 1):
        assert torch.equal(keys["full"][layer], keys["fastkv(layer=1, budget=0.25)"][layer])
    assert keys["fastkv(layer=1, budget=0.25)"][2].shape[2] == 15  # what the budget keeps is more than a fifth


def test_without_a_cut_it_is_snapkv():
    """With avg pooling the order of pooling and summing does not matter, nor the mean or sum over a group."""
    view = random_view(B=2, H=2, G=3, T=40, left_pad=(0, 7), seed=1)
    keeps = [
        next(d for d in decided(m.after_prefill(view)) if isinstance(d, Keep))
        for m in (FastKV(budget=15, kernel=5, pool="avg"), kvfold.parse("snapkv(budget=15, window=8, kernel=5)"))
    ]
    assert torch.equal(keeps[0].mask, keeps[1].mask)


def test_as_many_as_the_budget_go_on_at_least():
    view = random_view(T=40)
    assert len(going_on(FastKV(budget=0.5, propagated=0.2, window=2), view)[0]) == 20
    assert len(going_on(FastKV(budget=4, propagated=0.01, window=4), view)[0]) == 5  # the window and one
    assert len(going_on(FastKV(budget=4, propagated=500), view)[0]) == 40
    padded = random_view(B=2, T=40, left_pad=(0, 35))
    assert [len(row) for row in going_on(FastKV(budget=4, propagated=10, window=2), padded)] == [10, 5]


def test_where_it_cuts():
    def layer(paged, depth, given=None):
        view = random_view(paged=paged, depth=depth, layer=paged[0])
        return FastKV(layer=given).last_whole(view)

    assert [layer(tuple(range(n)), n) for n in (32, 36, 40, 30)] == [15, 17, 19, 14]  # the first three: the paper's
    assert layer((5, 11, 17), 18) == 11 and layer((5, 11, 17), 18, given=5) == 5 and layer((0, 1), 2, given=9) == 1


def test_options():
    for options, message in (
        ({"layer": -1}, "layer=-1"), ({"propagated": 0.0}, "propagated=0.0"), ({"window": 0}, "window=0"),
        ({"kernel": 4}, "kernel=4"), ({"pool": "sum"}, "pool='sum'"), ({"budget": 2.0}, "budget=2.0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            FastKV(**options)


def test_it_reads_by_itself():
    """A shared prefill would be another's."""
    assert not kvfold.Cache(subject("llama"), "fastkv").shares_prefill
