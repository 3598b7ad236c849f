"""EpiCache against its card: attention of a patched prompt to what is cached, and budgets of layers that differ."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import kvfold
from kvfold import artefacts
from kvfold.artefacts import Artefact
from kvfold.budgets import allocate
from kvfold.budgets.sensitive import by_sensitivity
from kvfold.calibration.run import Run
from kvfold.calibration.sensitivity import Blocks, epicache_tables
from kvfold.methods.epicache import ASK, EpiCache, cached_peaks
from models import build, feed, follow, grow, reference, subject, tokens
from views import random_view, top

SIGMA = (0.9, 0.6, 0.3)
SENSITIVITY = tuple(1.0 - sigma for sigma in SIGMA)


def per_head(power: float, floor: float = 0.0, heads: int = 2) -> list[float]:
    """Mean tokens of each layer's heads at a budget of 1000."""
    shares = by_sensitivity(SENSITIVITY, float(power), floor)
    return [sum(row) / heads for row in allocate(1000, 5000, 5000, 3, heads, shares)]


def test_layer_budgets_of_the_card():
    assert per_head(0) == [1000, 1000, 1000]
    assert per_head(1) == pytest.approx([250, 1000, 1750])
    assert [int(1000 * share) for share in by_sensitivity(SENSITIVITY, 2.0)] == [45, 727, 2227]
    assert per_head(2, heads=1) == [46, 727, 2227]  # rounding down lost one token; it goes to the largest fraction
    assert sum(per_head(2)) == 3000


def test_a_floor_is_paid_for():
    assert per_head(2, floor=0.25, heads=1)[0] == 250 and sum(per_head(2, floor=0.25)) == 3000
    low, middle, high = by_sensitivity(SENSITIVITY, 2.0, 0.25)
    assert high / middle == pytest.approx((0.7 / 0.4) ** 2) and low == 0.25
    assert by_sensitivity(SENSITIVITY, 2.0, 1.0) == pytest.approx((1, 1, 1))
    assert by_sensitivity((0.0, 0.0), 1.0) == (1.0, 1.0)
    shares = by_sensitivity((0.1, 0.2, 0.3, 9.0), 3.0, 0.5)
    assert min(shares) == 0.5 and sum(shares) == pytest.approx(4)


def slow_scores(view, stored: int, head: int) -> list[float]:
    """The card's step 3 for one KV head: softmax over the cached keys alone, then the maximum."""
    group, best = view.queries.states.shape[1] // view.heads, [0.0] * stored
    seen = [j for j in range(stored) if bool(view.valid[0, head, j])]
    for member in range(head * group, (head + 1) * group):
        for query in view.queries.states[0, member]:
            weights = (view.keys[0, head, seen] @ query * view.place.scale).softmax(0)
            for j, weight in zip(seen, weights.tolist(), strict=True):
                best[j] = max(best[j], weight)
    return best


@pytest.mark.parametrize("stored", [1, 20, 31])
def test_scores_against_a_loop(stored):
    view = random_view(H=2, G=3, T=33, D=16, seed=stored)
    view = replace(view, queries=view.queries.pick(torch.arange(stored, 33)))
    if stored > 1:
        holes = view.valid.clone()
        holes[0, 1, [0, 3, stored - 1]] = False  # heads of other lengths
        view = replace(view, tokens=view.tokens.but(holes))
    found = cached_peaks(view)
    for head in range(2):
        assert_close(found[0, head], torch.tensor(slow_scores(view, stored, head)))


def test_what_is_chosen():
    view = random_view(H=2, T=5)
    scores = torch.tensor([[[0.9, 0.8, 0.7, 0.1, 0.1], [0.2, 0.3, 0.6, 0.1, 0.1]]])
    count = torch.tensor([[2, 2]])

    def chosen(**options):
        return [row.nonzero()[:, 0].tolist() for row in EpiCache(**options).choose(view, scores, count)[0]]

    assert chosen() == [[0, 1, 2], [2]]
    assert chosen(level="pair-uniform") == [[0, 1], [1, 2]]
    assert chosen(sinks=1) == [[0, 1, 2], [0]] and chosen(level="pair-uniform", sinks=1) == [[0, 1], [0, 2]]


def read(prompt, chunk: int | None = None, **options) -> kvfold.Cache:
    cache = kvfold.Cache(subject("llama"), EpiCache(**{"budget": 400, **options}), prefill_chunk=chunk)
    feed(subject("llama"), cache, *prompt.values())
    return cache


@pytest.mark.parametrize("chunk", [None, 16, 13])
def test_a_large_budget_is_the_plain_cache(chunk):
    """No eviction, whatever the blocks."""
    prompt, steps = tokens(60, 41), torch.arange(5, 11).view(2, 3)
    full, cache = kvfold.Cache(subject("llama"), "full"), read(prompt, chunk, budget=60)
    feed(subject("llama"), full, *prompt.values())
    assert [core.kept() for core in cache.paged] == [core.kept() for core in full.paged]
    mask = grow(prompt["attention_mask"], 3)
    got, expected = (feed(subject("llama"), each, steps, mask) for each in (cache, full))
    assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"power": 1.0, "sensitivity": SENSITIVITY}, {"level": "pair-uniform"}], ids=str
)
def test_every_layer_falls_to_its_budget_after_each_block(options):
    model, held = subject("llama"), []
    prompt = tokens(70)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    cache = kvfold.Cache(model, EpiCache(budget=12, **options))
    shares = by_sensitivity(options.get("sensitivity", (1.0,) * 3), options.get("power", 0.0))
    for stop in range(14, 71, 14):
        before = [core.counts()[0] for core in cache.paged] if cache.batch_size > 0 else [np.zeros(2, int)] * 3
        feed(model, cache, ids[:, stop - 14 : stop], mask[:, :stop])
        wanted = allocate(12, stop, stop, 3, 2, shares)
        held = [core.counts()[0] for core in cache.paged]
        for was, now, budget in zip(before, held, wanted, strict=True):
            assert now.sum() == min(sum(budget), was.sum() + 28)
            assert options.get("level") is None or (now == 12).all()
    assert sum(map(sum, held)) == 12 * 6


def test_the_block_itself_as_the_patch():
    """Without words the end of the block asks: attention of its second reading, worked out by transformers' keys."""
    model, length, views = subject("llama"), 30, []
    ids = tokens(length)["input_ids"]
    cache = read(tokens(length), budget=9)
    plain = kvfold.Cache(model, "full")
    with plain.observed(views.append):
        feed(model, plain, ids.repeat(1, 2), torch.ones(1, 2 * length, dtype=torch.long))
    for layer, view in enumerate(views):
        part = replace(view, queries=view.queries.pick(torch.arange(length, 2 * length)))
        scores = torch.tensor([slow_scores(part, length, head) for head in range(2)])
        kept = top(scores.flatten().tolist(), 18)
        assert cache.kept(layer)[0] == [[i - head * length for i in kept if i // length == head] for head in range(2)]


def test_nothing_of_the_patch_stays_and_old_tokens_compete():
    prompt = tokens(60)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = subject("llama"), kvfold.Cache(subject("llama"), EpiCache(budget=20))
    feed(model, cache, ids[:, :30], mask[:, :30])
    first = [core.kept()[0] for core in cache.paged]
    feed(model, cache, ids[:, 30:31], mask[:, :31])
    assert [[head[:-1] for head in core.kept()[0]] for core in cache.paged] == first  # appended
    feed(model, cache, ids[:, 31:], mask)
    assert all(core.counts().sum() == 40 and core.width == 60 and core.seen.tolist() == [60] for core in cache.paged)
    for core, before in zip(cache.paged, first, strict=True):
        for head, old in zip(core.kept()[0], before, strict=True):
            assert {p for p in head if p < 30} <= set(old)


def test_rows_on_their_own():
    prompt = tokens(50, 13)
    both = read(prompt, 8, budget=9)
    alone = kvfold.Cache(subject("llama"), EpiCache(budget=9), prefill_chunk=8)
    ids = prompt["input_ids"][1:, 37:]
    for start, stop in ((0, 3), (3, 11), (11, 13)):  # where the padded batch's chunks of 8 end
        with alone.prefilling():
            feed(subject("llama"), alone, ids[:, start:stop], torch.ones(1, stop, dtype=torch.long))
    assert [core.kept()[1] for core in both.paged] == [core.kept()[0] for core in alone.paged]


class Words:
    """A prompt view that has words."""

    step, prefill = {}, True
    ids, valid = torch.tensor([[0, 7, 8], [4, 5, 6]]), torch.tensor([[False] * 3, [True] * 3])

    def encode(self, text):
        return {ASK: [1, 2], "patch": [9]}.get(text, [])

    def answer(self):
        return [3]

    def __len__(self):
        return 1

    def __getitem__(self, ordinal):
        raise NotImplementedError

    look_ahead = read = __getitem__


def test_what_is_asked():
    ids, valid = EpiCache(patch="patch").patched(Words())
    assert ids.tolist() == [[1, 2, 3, 9]] * 2 and valid.tolist() == [[False] * 4, [True] * 4]
    assert EpiCache().patched(Words())[0].tolist() == [[1, 2, 3]] * 2


def test_a_patch_survives_its_text():
    method = EpiCache(patch='Ann said, "It\'s (not) | here"\n\\ [a]\n', budget=0.5)
    assert kvfold.parse(str(method)) == method and kvfold.parse(f"snapkv(budget=0.9) | {method}").stages[1] == method


def test_sensitivity_comes_from_an_artefact(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_ARTEFACTS", str(tmp_path))
    model = subject("llama")
    assert kvfold.Cache(model, "epicache").method.sensitivity is None  # nothing is looked for
    with pytest.raises(ValueError, match="epicache has no calibration"):
        kvfold.Cache(model, "epicache", power=1.0)
    about = {"fingerprint": artefacts.fingerprint(model), "name": "tiny"}
    artefacts.save(Artefact("epicache", about, {"sensitivity": [0.1, 0.4, 0.7]}, {}))
    bound = kvfold.Cache(model, "epicache", power=1.0, budget=8)
    assert bound.method.sensitivity == (0.1, 0.4, 0.7)
    feed(model, bound, *tokens(40).values())
    assert [int(core.counts().sum()) for core in bound.paged] == [4, 16, 28]
    with pytest.raises(ValueError, match=r"sensitivity=\(0.1,\) must be 3 numbers, one a layer: kvfold calibrate"):
        feed(model, kvfold.Cache(model, "epicache", power=1.0, sensitivity=(0.1,), budget=6), *tokens(40).values())


def test_a_window_model_keeps_its_windows():
    prompt = tokens(40, 25)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = subject("gemma3"), kvfold.Cache(subject("gemma3"), EpiCache(budget=400))
    steps = torch.arange(5, 15).view(2, 5)
    got = follow(model, cache, ids, mask, steps)
    expected = feed(reference("gemma3"), None, torch.cat([ids, steps], 1), grow(mask, 5))[:, 39:]
    assert_close(got, expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget=0 must be"),
        ({"level": "head"}, "level='head' must be one of 'pair', 'pair-uniform'"),
        ({"sinks": -1}, "sinks=-1 must be an int >= 0"),
        ({"power": -1.0}, r"power=-1.0 must be a number in \[0.0, 64.0\]"),
        ({"floor": 1.5}, r"floor=1.5 must be a number in \[0.0, 1.0\]"),
        ({"sensitivity": ("a",)}, "sensitivity="),
        ({"patch": 3}, "patch=3 must be a text, or None"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        EpiCache(**options)


# -- calibration ---------------------------------------------------------------------------------------------


def test_blocks_see_sinks_and_half_of_the_block_before():
    """Against the whole matrix with the card's mask."""
    blocks, total = Blocks([0], block=8, sinks=2), 21
    q, k, v = (torch.randn(1, heads, total, 16) for heads in (4, 2, 2))
    mask = torch.zeros(total, total, dtype=torch.bool)
    for i in range(total):
        start = i // 8 * 8
        for j in range(i + 1):
            mask[i, j] = j < 2 or j >= start - 4
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert_close(blocks.in_blocks(q, k, v, None), expected)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_sensitivity_is_what_blocks_do_to_keys(name):
    model = build(name)

    class Ids:
        bos_token_id = 1

        def __call__(self, text, **_):
            return SimpleNamespace(input_ids=[3 + ord(letter) % 90 for letter in text])

    def measured(length):
        run = Run(model, Ids(), [("a", "It was a dark and stormy night. " * 9)], length=length)
        return epicache_tables(run)["sensitivity"], run.about

    found, about = measured(256)
    assert about == {"samples": 1, "length": 256, "block": 64, "sinks": 2}
    assert len(found) == len(kvfold.Cache(model).paged) and all(0 < sensitivity < 2 for sensitivity in found[1:])
    assert found[0] < 1e-6  # no layer before the first one saw less
    assert model.config._attn_implementation == "kvfold"
