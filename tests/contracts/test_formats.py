"""Every method x every format: what holds for a method holds in whatever format its tokens lie."""

from dataclasses import dataclass

import pytest
import torch

import kvfold
from calibrated import SMALL
from families import LIMITED, METHODS, each
from kvfold.formats import Dense, Indexed
from kvfold.methods.registry import parse
from models import feed, follow, grow, subject, tokens

pytestmark = pytest.mark.usefixtures("scratch_methods")
FORMATS = {
    "bf16": 0.03,
    "fp8": 0.2,
    "kivi(group=8, channels=8, residual=8, requantise=True)": 0.7,
    "mustafar(key_sparsity=0.15, value_sparsity=0.15, residual=8, group=8)": 0.7,
}
"""Formats as they stand behind a method, and how far the tiny models' next logits may be from those of float32, of
their length. (The worst were .011, .124 and .599 of 38 methods; medians .008, .078 and .100.)"""
IDS = ["bf16", "fp8", "kivi", "mustafar"]
STEPS = torch.arange(5, 45).view(2, 20)
HOLDS = [info.slug for info in kvfold.list_methods() if info.kind not in ("quantize", "sparse", "low-rank")]
"""Methods that say which tokens are held, not how."""


@pytest.fixture(autouse=True)
def half(scratch_methods):
    """Dense tokens in bfloat16, as a stage."""

    @kvfold.method("bf16", title="Half", kind="quantize")
    @dataclass(frozen=True)
    class Half(kvfold.Method):
        @property
        def format(self):
            return Dense(torch.bfloat16)


def made(slug: str, form: str, **more):
    """A model, and a cache of `slug` with its tokens in a format."""
    options = {**({"budget": 0.5} if slug in LIMITED else {}), **SMALL.get(slug, {})}
    first = parse(slug, **options)
    return subject("llama"), kvfold.Cache(subject("llama"), first | parse(form), **more)


def codes(cache) -> list[dict[str, torch.Tensor]]:
    """What each layer's segments hold, bit for bit."""
    return [
        {f"{form}.{name}": plane for form, segment in core.segments for name, plane in segment.state()[1].items()}
        for core in cache.paged
    ]


def same(one, two) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)
        for a, b in zip(codes(one), codes(two), strict=True)
    )


def bits(plane: torch.Tensor) -> torch.Tensor:
    return plane.contiguous().view(torch.uint8)


each_method = each(HOLDS)
each_format = pytest.mark.parametrize("form", FORMATS, ids=IDS)


@each_method
@each_format
def test_the_prompt_is_exact_and_steps_are_near(slug, form):
    """A prompt is attended in full precision, so the same tokens are held; what follows reads codes."""
    prompt = tokens(60, 41)
    options = {**({"budget": 0.5} if slug in LIMITED else {}), **SMALL.get(slug, {})}
    model = subject("llama")
    plain, (_, cache) = kvfold.Cache(model, slug, **options), made(slug, form)
    truth, got = feed(model, plain, *prompt.values()), feed(model, cache, *prompt.values())
    torch.testing.assert_close(got[:, -1], truth[:, -1], atol=1e-4, rtol=0)
    method = parse(slug, **options)
    reads_on = method.listens("after_prompt")  # from what is stored, so that it may choose others
    assert reads_on or [cache.kept(i) for i in range(3)] == [plain.kept(i) for i in range(3)]
    assert cache.nbytes < plain.nbytes or form not in ("bf16", "fp8")  # pages and tails are long for so short a text
    mask = grow(prompt["attention_mask"])
    truth, got = (feed(model, c, STEPS[:, :1], mask) for c in (plain, cache))
    reads_others = reads_on or method.listens("selection")  # by queries of layers behind others that read codes
    assert (truth - got).norm() < FORMATS[form] * truth.norm() * (3 if reads_others else 1)


@each_method
@each_format
def test_crop_reorder_fork_and_save(slug, form, tmp_path):
    """What is cropped may be read again; rows follow a reorder; forks and files go on alike, codes and all."""
    prompt = tokens(60, 41)
    model, cache = made(slug, form)
    follow(model, cache, *prompt.values(), STEPS[:, :2])
    mask = grow(prompt["attention_mask"], 2)
    fork = cache.fork()
    cache.save(tmp_path / "c")
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    assert same(loaded, cache) and loaded.method == cache.method
    token, after = STEPS[:, 2:3], grow(mask)
    first, second, third = (feed(model, c, token, after) for c in (cache, fork, loaded))
    # Pages of a fork lie elsewhere, and sums differ in their last bit: a number may get the next code.
    off = 5e-3 if form == "fp8" else 1e-5
    torch.testing.assert_close(second, first, atol=off, rtol=0)
    torch.testing.assert_close(third, first, atol=off, rtol=0)
    assert same(loaded, cache) and [c.kept(1) for c in (fork, loaded)] == [cache.kept(1)] * 2
    swapped = cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert [swapped.kept(i)[::-1] for i in range(3)] == [cache.kept(i) for i in range(3)]
    later = grow(after)
    one = feed(model, cache.fork(), STEPS[:, 3:4], later)
    two = feed(model, swapped, STEPS[[1, 0], 3:4], later[[1, 0]])
    torch.testing.assert_close(two[[1, 0]], one, atol=1e-4, rtol=0)
    cache.crop(-1)
    assert all(max(map(max, filter(None, row)), default=0) < 63 for i in range(3) for row in [cache.kept(i)[0]])
    forms = [form for core in cache.paged for form, _ in core.segments if isinstance(form, Indexed)]
    traces = any(getattr(form.selection.index, "recalls", False) for form in forms)  # queries that a crop forgets
    if not cache.rows.listens("after_decode") and not traces:
        again = feed(model, cache, token, after)
        torch.testing.assert_close(again, first, atol=1e-4, rtol=0)


@each_method
@each_format
def test_a_second_turn_and_a_late_merge(slug, form):
    """After a further prompt the budget holds again, over tokens that are stored as codes."""
    prompt = tokens(70, 51)
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    model, cache = made(slug, form)
    feed(model, cache, ids[:, :40], mask[:, :40])
    feed(model, cache, ids[:, 40:], mask)
    logits = follow(model, cache, STEPS[:, :4], grow(mask, 4), STEPS[:, 4:6])
    assert logits.isfinite().all()
    if slug in LIMITED:
        for row, length in enumerate((74, 55)):
            held = sum(int(core.counts()[row].sum()) for core in cache.paged)
            assert held <= (0.5 * (length + 2) + 4) * 2 * 3
    for core in cache.paged:
        for row in core.kept():
            for kept in row:
                assert kept == sorted(set(kept))


@each_method
@each_format
def test_a_prompt_in_chunks(slug, form):
    """Codes are read by later chunks, and written once: what is held is what the method would hold of them."""
    prompt = tokens(70, 51)
    model, cache = made(slug, form, prefill_chunk=24)
    seen = []
    with cache.observed(lambda view: seen.append(view.new)):
        logits = feed(model, cache, *prompt.values())
    assert logits.isfinite().all()
    own = cache.method.own_prefill or cache.rows.listens("after_prompt")  # those read other tokens, or read on
    assert own or set(seen) == {24, 22}
    for core in cache.paged:
        assert all(kept == sorted(set(kept)) for row in core.kept() for kept in row)
        if slug == "full":  # nothing went, and the first chunk's codes are those that it had when it was read alone
            assert [len(row[0]) for row in core.kept()] == [70, 51]
    if slug == "full":
        first = made(slug, form)[1]
        feed(model, first, prompt["input_ids"][:, :24], prompt["attention_mask"][:, :24])
        for ours, theirs in zip(codes(cache), codes(first), strict=True):
            coded = [name for name in theirs if ".coded." in name or theirs[name].dtype != torch.float32]
            name = next(name for name in coded if name.endswith("keys"))
            some = theirs[name][: min(8, len(theirs[name]))]
            assert torch.equal(bits(ours[name][: len(some)]), bits(some))


@each_format
def test_streaming_gives_the_codes_of_one_shot(form):
    """Token by token, in chunks, at once: bit for bit the same, as keys and values come the same from the model."""
    from kvfold.formats import POSITION, Chunk, Spec

    shape = parse(form).format
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 50, 16, generator=generator) for _ in range(2))
    positions = torch.arange(50, dtype=torch.int32).expand(2, 2, 50)
    valid = torch.ones(2, 2, 50, dtype=torch.bool)
    found = []
    for sizes in ([50], [1] * 50, [7, 20, 1, 22]):
        segment, start = shape.open(Spec(2, 2, 16, 16, torch.float32, torch.device("cpu"))), 0
        for size in sizes:
            here = slice(start, start + size)
            segment.append(
                Chunk(keys[:, :, here], values[:, :, here], valid[..., here], {POSITION: positions[..., here]})
            )
            start += size
        found.append(segment.state())
    for said, planes in found[1:]:
        assert said == found[0][0]
        assert all(torch.equal(bits(planes[name]), bits(plane)) for name, plane in found[0][1].items())


@pytest.mark.parametrize("method", ["h2o(budget=0.5)", "kvzip(budget=0.5)", "cake(budget=0.5)", "tova(budget=9)"])
def test_a_method_that_drops_stored_tokens_is_refused_over_pages(method):
    with pytest.raises(ValueError, match=r"kivi\(.*requantise=True"):
        kvfold.parse(f"{method} | kivi")


def test_a_second_prompt_is_refused_before_anything_is_stored():
    model = subject("llama")
    cache = kvfold.Cache(model, "snapkv(budget=0.5) | kivi(group=8, channels=8, residual=8)")
    prompt = tokens(60, 41)
    feed(model, cache, *prompt.values())
    before = cache.kept(0), cache.nbytes
    with pytest.raises(ValueError, match="requantise=True"):
        feed(model, cache, STEPS[:, :5], grow(prompt["attention_mask"], 5))
    assert (cache.kept(0), cache.nbytes) == before
    feed(model, cache, STEPS[:, :1], grow(prompt["attention_mask"]))
    with pytest.raises(ValueError, match="requantise=True"):
        kvfold.Cache(model, "snapkv(budget=0.5) | kivi", prefill_chunk=16)


@pytest.mark.parametrize("slug", METHODS)
def test_two_formats_for_all_tokens_are_refused(slug):
    with pytest.raises(ValueError, match="two stages with a format for all tokens"):
        parse(slug, **SMALL.get(slug, {})) | parse("fp8") | parse("kivi")
