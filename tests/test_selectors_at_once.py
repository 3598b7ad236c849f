"""A step that is one operation: it reads what its parts read one after another, and nothing else."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from kvfold import ops
from kvfold.formats import POSITION, Chunk, Dense, Indexed
from kvfold.formats.indexed import choices_seen
from kvfold.ops.units import naive
from kvfold.selectors import Always, Bounds, Hierarchical, Keys, Means, Selection, Vote
from kvfold.testing import feed, follow, grow, steps, tokens
from models import build, subject
from test_selectors import STEPS, B, D, G, H, agrees, fresh, some


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    ("text", "whole", "layers"),
    [("quest(budget=48, dense=0)", "step_units", 3), ("tokenselect(budget=48)", "step_keys", 3),
     ("tokenselect(budget=48, positions='text', vote='group')", "step_keys", 3)],
)  # fmt: skip
def test_a_step_costs_what_it_reads(monkeypatch, watched, text, whole, layers):
    """The kernel is handed few pages or tokens, or finds them, and never a mask of all slots."""
    model, seen, at_once = subject("llama"), [], []
    cache = kvfold.Cache(model, text)
    prompt = tokens(400)
    feed(model, cache, *prompt.values())
    plain, once = ops.attend_pages, getattr(ops, whole)

    def counted(q, table, *args, read=None, **more):
        seen.append((int(table.lengths.max()), read))
        return plain(q, table, *args, read=read, **more)

    monkeypatch.setattr(ops, "attend_pages", counted)
    monkeypatch.setattr(ops, whole, lambda *args, **more: at_once.append(args) or once(*args, **more))
    mask = prompt["attention_mask"]
    with choices_seen(lambda *given: None) if watched else nullcontext():
        for step in steps(1, 20).T:
            mask = grow(mask)
            feed(model, cache, step[:, None], mask)
    assert len(seen) == (layers * 20 if watched else 0) and all(read is None and length <= 48 for length, read in seen)
    assert len(at_once) == (0 if watched else layers * 20)


@pytest.mark.parametrize(
    "text",
    [
        "infllm(budget=64, block=16, sinks=8, local=24)",
        "tokenselect(budget=48, reuse=0.9)",
        "mpcache(budget=1.0, threshold=0.0)",
    ],
)
def test_what_is_chosen_part_by_part_costs_what_it_reads(monkeypatch, text):
    """Wherever what is read stands: the kernel is handed lists of pages or tokens, and never a mask of all slots."""
    model, seen = subject("llama"), []
    cache, plain = kvfold.Cache(model, text), ops.attend_pages
    prompt = tokens(400)
    feed(model, cache, *prompt.values())

    def counted(q, table, *args, read=None, **more):
        seen.append((int(table.lengths.max()), read))
        return plain(q, table, *args, read=read, **more)

    monkeypatch.setattr(ops, "attend_pages", counted)
    mask = prompt["attention_mask"]
    for step in steps(1, 20).T:
        mask = grow(mask)
        feed(model, cache, step[:, None], mask)
    assert len(seen) == 3 * 20 and all(read is None and length <= 150 for length, read in seen)


SELECTING = [
    "tokenselect(budget=48)", "tokenselect(budget=48, pool=3)", "tokenselect(budget=48, reuse=0.9)", "quest(budget=48)",
    "mpcache(budget=0.5)", "infllm(budget=64, block=16, sinks=8, local=24)", "nosa(budget=64)", "shadowkv(budget=48)",
    "pqcache(budget=48)", "sentencekv(budget=48)", "lserve(budget=64)",
]  # fmt: skip


@pytest.mark.parametrize("text", SELECTING)
@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["prompt", "steps"])
def test_passes_in_inference_mode_and_others_go_on_from_each_other(text, modes):
    """What a prompt leaves in one mode is written in the other: the same is read, and nothing refuses."""
    model, prompt, found = subject("llama"), tokens(200), []
    for mixed in (modes, (False, False)):
        cache, mask, logits = kvfold.Cache(model, text), prompt["attention_mask"], []
        with torch.inference_mode(mixed[0]), torch.no_grad():
            feed(model, cache, *prompt.values())
        for number, step in enumerate(steps(1, 20).T):
            mask = grow(mask)
            with torch.inference_mode(mixed[number % 2]), torch.no_grad():
                logits.append(feed(model, cache, step[:, None], mask).clone())
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "text", ["snapkv(budget=0.5) | tokenselect(budget=48, vote='group')", "tokenselect(budget=70)"]
)
def test_a_row_that_reads_everything_reads_it_where_it_stands(text, watched):
    """Whoever is beside it: only rows that choose have what they read stand side by side."""
    model, prompt, said = subject("llama"), tokens(300, 60), steps(2, 8)
    with choices_seen(lambda *given: None) if watched else nullcontext():
        both = follow(model, kvfold.Cache(model, text), *prompt.values(), said)
        for row, length in enumerate((300, 60)):
            ids, mask = (x[row : row + 1, -length:] for x in prompt.values())
            alone = follow(model, kvfold.Cache(model, text), ids, mask, said[row : row + 1])
            torch.testing.assert_close(both[row : row + 1], alone, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "dtype", "at_once"),
    [("llama", torch.float32, True), ("llama", torch.bfloat16, True), ("llama", torch.float16, False)],
)
def test_what_no_kernel_does_at_once_is_done_by_those_of_its_parts(monkeypatch, family, dtype, at_once):
    """A step is never left to the definition, which reads all there is."""
    model, cache_of = build(family, dtype=dtype), lambda model: kvfold.Cache(model, "tokenselect(budget=48)")
    asked, whole = [], ops.step_keys
    monkeypatch.setattr(ops, "step_keys", lambda *args: asked.append(1) or whole(*args))
    monkeypatch.setattr(naive, "step_keys", None)
    prompt = tokens(200)
    follow(model, cache_of(model), *prompt.values(), steps(1, 3))
    assert len(asked) == (9 if at_once else 0)


def plain_of(chunk: Chunk) -> Chunk:
    """With no columns but positions."""
    return chunk.but(chunk.valid, {POSITION: chunk.columns[POSITION]})


KEYS = {
    "layer": Selection(Keys(6), 12, Vote("sum", layer=True, softmax=True, scaled=False), Always(3, 5, 0.6), slots=True),
    "group": Selection(Keys(0), 0.3, Vote("max", softmax=True), Always(1, 2), slots=True),
    "text": Selection(Keys(6), 21, Vote("sum", layer=True, softmax=True), Always(2, 3, 0.5)),
}


@pytest.mark.parametrize("index", [Bounds(4), Bounds(8), Bounds(6), Hierarchical(8, 4), Means(4)], ids=str)
@given(steps=STEPS, seed=st.integers(0, 99), heads=st.sampled_from(["each", "sum", "max"]), budget=st.integers(4, 30))
@settings(max_examples=40, deadline=None)
def test_a_step_at_once_is_what_its_parts_are(index, steps, seed, heads, budget):
    """Whatever happens between steps: what is read, and what is held then, is the same to the bit.

    Where units are whole pages and have bounds of their own it is one operation.
    """
    step_and_change(Selection(index, budget, Vote(heads), Always(4, 4)), steps, seed)


@pytest.mark.parametrize("selection", KEYS.values(), ids=KEYS)
@given(steps=STEPS, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_step_that_asks_every_key_at_once_is_what_its_parts_are(selection, steps, seed):
    step_and_change(selection, steps, seed)


def step_and_change(selection, steps, seed):
    """Two segments of which one steps at once, and the other part by part, whatever else happens."""
    form = Indexed(Dense(page_size=4), selection)
    pair, at = [fresh(form=form), fresh(form=form)], 40
    for segment in pair:
        segment.append(plain_of(some([[9, 12], [30, 5]], seed)))
    rng = torch.Generator().manual_seed(seed)
    for number, (what, value) in enumerate([*steps, ("step", None), ("step", None)]):
        at, b = at + 1, len(pair[0].counts())
        valid, _ = pair[0].columns()
        left = torch.rand(valid.shape, generator=rng)
        q = torch.randn(b, H, G, 1, D, generator=rng)
        k, v = torch.randn(2, b, H, 1, D, generator=rng).unbind(0)
        found = []
        for index, segment in enumerate(pair):
            if what == "append":
                segment.append(plain_of(some([value[row % B] for row in range(b)], seed + number, at)))
            elif what == "step":
                with choices_seen(lambda *given: None) if index else nullcontext():
                    places = torch.full((b, 1), at)
                    found.append(segment.step(q, k, v, places, 0.3, weights=False))
            elif what == "keep":
                segment.keep(valid & (left < value), {}, slack=bool(seed % 2))
            elif what == "truncate":
                segment.truncate(np.maximum(segment.counts() - value, 0))
            elif what == "select":
                pair[index] = segment.select(np.array(value))
            elif what == "clear":
                segment.clear()
        for one, two in zip(*(found or [[], []]), strict=True):
            assert (one is None and two is None) or torch.equal(one, two)
        assert pair[0].nbytes == pair[1].nbytes and (pair[0].seen == pair[1].seen).all()
        agrees(pair[0])


def test_what_is_not_chosen_is_not_looked_at():
    form = Indexed(Dense(page_size=4), Selection(Bounds(4), 12))
    segment, q, seen = fresh(form=form), torch.randn(B, H, G, 1, D), []
    segment.append(plain_of(some([[60, 60], [60, 60]], 0)))
    with choices_seen(lambda *given: seen.append(given[3])):
        want = segment.attend_few(q, 0.3)
    dull = ~seen[0].mask.any(2).reshape(B * H, -1)
    table = segment.inner.table
    for name in ("keys", "values"):
        table.pool.planes[name][torch.from_numpy(table.table[:, : dull.shape[1]][dull].astype(np.int64))] = torch.nan
    assert dull.sum() > 10
    for one, two in zip(want[:2], segment.attend_few(q, 0.3)[:2], strict=True):
        assert torch.equal(one, two)
