"""Values are fitted to what the last queries read, and what that was: left by the pass, or worked out."""

from dataclasses import replace

import torch

import kvfold
from kvfold.formats import LOG_MASS
from kvfold.merges import refit
from kvfold.methods.kvfold import KVFold
from kvfold.views.decisions import Amend, Keep
from models import feed, subject, tokens
from views import after_all, random_view


def test_values_are_fitted_to_what_the_last_queries_read():
    """Against ridge regression as a least-squares problem with rows for the price; sinks and recent tokens stay."""
    view, options = random_view(B=2, H=2, G=2, T=24, D=4, left_pad=(0, 17), seed=3), {"recent": 0.25, "sinks": 1}
    plain, fitted = (
        after_all(view, KVFold(budget=8, threshold=0.4, kernel=3, refit=refit, heads="even", **options))
        for refit in (0, 5)
    )
    assert torch.equal(plain.valid, fitted.valid) and torch.equal(plain.keys, fitted.keys)
    asked = view.queries.last(5)
    truth = view.attention_of(asked) @ view.values[:, :, None]
    weights = plain.attention_of(asked)
    for row, head in ((0, 0), (0, 1)):
        kept = plain.valid[row, head].nonzero()[:, 0]
        free = kept[1:-2]
        a = weights[row, head].flatten(0, 1)
        missing = truth[row, head].flatten(0, 1) - a @ plain.values[row, head]
        price = a[:, free].square().sum(-1).mean().sqrt()
        rows = torch.cat([a[:, free], price * torch.eye(len(free))])
        change = torch.linalg.lstsq(rows, torch.cat([missing, torch.zeros(len(free), 4)])).solution
        expected = plain.values[row, head].clone()
        expected[free] += change
        torch.testing.assert_close(fitted.values[row, head][kept], expected[kept], atol=1e-4, rtol=1e-3)
    assert torch.equal(fitted.values[1], plain.values[1])  # seven tokens: nothing went


def test_the_fit_on_two_threads_of_heads_that_lost_nothing():
    """The threaded LU of MKL fails on a batch with them: their systems are tiny multiples of the identity."""
    rng = torch.Generator().manual_seed(0)
    view = random_view(B=1, H=3, G=3, T=400, D=64, seed=3)
    kept = (torch.rand(1, 3, 400, generator=rng) < 0.2) | (view.rank >= 380)
    kept[0, 1] = True
    asked = view.queries.last(64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            amend = refit(view, view.apply(Keep(kept)), asked, view.read_by(asked).flatten(2, 3), kept)
        finally:
            torch.set_num_threads(1)
        found.append(view.apply(amend).values)
    assert torch.equal(found[1][0, 1], view.values[0, 1]) and not torch.equal(found[1][0, 0], view.values[0, 0])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_what_the_pass_left_of_its_answers_is_what_the_view_works_out():
    """For a padded batch and on a further turn, where what is stored is folded and stands for more than itself."""
    model, prompt = subject("llama"), tokens(70, 43)
    cache, views = kvfold.Cache(model, "kvfold(budget=20)"), []
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    with cache.observed(views.append):
        feed(model, cache, ids, mask)
        feed(model, cache, tokens(9, 9, seed=2)["input_ids"], torch.cat([mask, mask.new_ones(2, 9)], 1))
    assert len(views) == 2 * len(cache.paged) and bool((views[-1].columns[LOG_MASS] > 0).any())
    for view in views:
        asked = view.queries.last(50)
        assert asked.read is not None
        worked_out = view.read_by(replace(asked, read=None))
        assert worked_out.shape[3] == min(50, view.new)
        torch.testing.assert_close(view.read_by(asked), worked_out, atol=1e-5, rtol=1e-4)
        poisoned = asked.read.masked_fill(~asked.valid[:, None, :, None], torch.nan)
        torch.testing.assert_close(view.read_by(replace(asked, read=poisoned)), worked_out, atol=1e-5, rtol=1e-4)


def test_a_pass_that_read_keys_at_compact_positions_tells_the_fit_nothing():
    """Nor does one before keys were rewritten: scores are taken of the keys as they stand, at text positions."""
    model, ids = subject("llama"), tokens(60)["input_ids"]
    cache = kvfold.Cache(model, "streamingllm(budget=20, positions='compact') | kvfold(budget=12, heads='even')")
    views, mask = [], torch.ones_like(ids)
    feed(model, cache, ids[:, :40], mask[:, :40])
    with cache.observed(views.append):
        feed(model, cache, ids[:, 40:], mask)
    for view in views:
        asked = view.queries.last(8)
        there = view.attention_of(asked) @ view.values[:, :, None]
        assert asked.read is not None and (asked.read.flatten() - there.flatten()).abs().max() > 1e-3
        assert torch.equal(view.read_by(asked), there)
        as_text = replace(view, place=replace(view.place, compact=False))
        assert not torch.equal(as_text.read_by(asked), there)
        double = Amend(torch.arange(3).expand(1, view.heads, 3), None, 2 * view.values[:, :, :3])
        changed = as_text.apply(double)
        assert torch.equal(changed.read_by(asked), changed.attention_of(asked) @ changed.values[:, :, None])
