"""The same promises on a CUDA device: exact when nothing is dropped, budgets, rows, beams, files, bytes."""

import gc
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import kvfold
from kvfold.hf.graph import decode_graph
from models import VOCAB, build, dynamic, feed, follow, greedy, grow, tokens

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

METHODS = [info.slug for info in kvfold.list_methods()]
LIMITED = [info.slug for info in kvfold.list_methods() if "budget" in info.options and info.slug != "look-m"]
"""look-m leaves a text without images as it is."""
BOTH = pytest.mark.parametrize("name", ["llama", "gemma3"])
ALL = pytest.mark.parametrize("slug", METHODS)
LENGTHS = (60, 41, 1)


@lru_cache(maxsize=16)
def on_device(name: str, dtype: torch.dtype = torch.float32, role: str = "subject"):
    """A model for kvfold, or ("reference") one that it never sees."""
    return build(name, dtype=dtype).to(DEVICE)


def make(slug="full", name="llama", dtype=torch.float32, **options):
    options = {"budget": 0.5, **options} if slug in LIMITED else options
    return on_device(name, dtype), kvfold.Cache(on_device(name, dtype), slug, **options)


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask on the device."""
    ids, mask = tokens(*lengths).values()
    return ids.to(DEVICE), mask.to(DEVICE)


def forced(rows: int, count: int) -> Tensor:
    return torch.randint(3, VOCAB, (rows, count), generator=torch.Generator().manual_seed(9)).to(DEVICE)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


# -- nothing dropped -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("lengths", [(60,), LENGTHS], ids=["one", "padded"])
def test_full_is_the_dynamic_cache(name, lengths):
    ids, mask = prompts(*lengths)
    theirs = on_device(name, role="reference")
    chosen, truth = greedy(theirs, dynamic(theirs), ids, mask, 24)
    model, cache = make("full", name)
    got = follow(model, cache, ids, mask, chosen[:, :-1])
    close(got, truth)
    assert all(core.stored.spec.device.type == DEVICE for core in cache.paged)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_full_in_narrow_dtypes(name, dtype):
    ids, mask = prompts(*LENGTHS)
    exact, theirs = on_device(name, role="reference"), on_device(name, dtype, "reference")
    chosen, truth = greedy(exact, dynamic(exact), ids, mask, 16)
    reference = follow(theirs, dynamic(theirs), ids, mask, chosen[:, :-1]).float()
    model, cache = make("full", name, dtype)
    ours = follow(model, cache, ids, mask, chosen[:, :-1])
    assert ours.dtype == dtype
    # As far from float32 as transformers is in this dtype, give or take a half.
    assert (ours.float() - truth).square().mean().sqrt() < 1.5 * (reference - truth).square().mean().sqrt() + 1e-6
    assert cache.paged[0].segments[0][1].pool.planes["keys"].dtype == dtype


@BOTH
def test_beams(name):
    ids, mask = prompts(40, 23)
    options = dict(max_new_tokens=12, num_beams=3, do_sample=False)
    theirs = on_device(name, role="reference")
    expected = theirs.generate(input_ids=ids, attention_mask=mask, past_key_values=dynamic(theirs), **options)
    model, cache = make("full", name)
    got = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
    assert torch.equal(got, expected)


# -- methods -------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_half_the_budget(slug, dtype):
    ids, mask = prompts(*LENGTHS)
    model, cache = make(slug, dtype=dtype)
    logits = follow(model, cache, ids, mask, forced(3, 6))
    assert logits.device.type == DEVICE and logits.isfinite().all()
    steps = 0 if kvfold.parse(slug).listens("after_decode") else 6  # generated tokens come on top elsewhere
    for row, length in enumerate(LENGTHS):
        held = sum(int(core.counts()[row].sum()) for core in cache.paged)
        assert held <= ((0.5 * length if slug in LIMITED else length) + steps) * 6
    beams = kvfold.Cache(model, cache.method)
    model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=beams, num_beams=3, max_new_tokens=5, do_sample=False
    )
    assert beams.batch_size == 9


@ALL
@BOTH
def test_a_batch_is_its_rows(slug, name):
    ids, mask = prompts(*LENGTHS)
    model, cache = make(slug, name)
    steps = forced(3, 4)
    logits = follow(model, cache, ids, mask, steps)
    for row, length in enumerate(LENGTHS):
        _, alone = make(slug, name)
        own = ids[row : row + 1, -length:]
        close(follow(model, alone, own, torch.ones_like(own), steps[row : row + 1])[0], logits[row])
        for core, single in zip(cache.paged, alone.paged, strict=True):
            assert single.kept()[0] == core.kept()[row]


@ALL
def test_keeps_what_the_cpu_keeps(slug):
    ids, mask = prompts(60, 41)
    model, cache = make(slug)
    feed(model, cache, ids, mask)
    options = {"budget": 0.5} if slug in LIMITED else {}
    host = build("llama")
    expected = kvfold.Cache(host, slug, **options)
    feed(host, expected, ids.cpu(), mask.cpu())
    assert [cache.kept(layer) for layer in range(3)] == [expected.kept(layer) for layer in range(3)]


@pytest.mark.parametrize("slug", ["full", "snapkv"])
@pytest.mark.parametrize("lengths", [(60,), LENGTHS], ids=["one", "padded"])
def test_a_graph_decodes_what_steps_do(slug, lengths):
    ids, mask = prompts(*lengths)
    options = dict(max_new_tokens=40, do_sample=False, eos_token_id=None)
    model, cache = make(slug)
    expected = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **options)
    model, graphed = make(slug)
    with decode_graph(model, graphed) as graph:
        got = model.generate(input_ids=ids, attention_mask=mask, past_key_values=graphed, **options)
    assert torch.equal(got, expected) and 1 <= graph.captures < 10
    assert [core.kept() for core in graphed.paged] == [core.kept() for core in cache.paged]


# -- the cache operations ------------------------------------------------------------------------------------


@ALL
@BOTH
def test_fork_save_and_load(slug, name, tmp_path):
    ids, mask = prompts(60, 41)
    model, cache = make(slug, name)
    feed(model, cache, ids, mask)
    cache.save(tmp_path / "cache")
    branch, loaded = cache.fork(), kvfold.Cache.load(tmp_path / "cache", model)
    assert all(core.stored.spec.device.type == DEVICE for core in loaded.paged)
    follow(model, branch, forced(2, 1), grow(mask), forced(2, 8))  # must not disturb the others
    mask, step = grow(mask), forced(2, 1)
    for _ in range(5):
        expected, got = feed(model, cache, step, mask), feed(model, loaded, step, mask)
        close(got, expected)
        step, mask = expected.argmax(-1), grow(mask)
    assert [core.kept() for core in loaded.paged] == [core.kept() for core in cache.paged]


def test_files_move_between_devices(tmp_path):
    ids, mask = prompts(60, 41)
    model, cache = make("snapkv")
    feed(model, cache, ids, mask)
    cache.save(tmp_path / "cache")
    host = build("llama")
    loaded = kvfold.Cache.load(tmp_path / "cache", host)
    assert loaded.kept(1) == cache.kept(1)
    step, mask = forced(2, 1), grow(mask)
    close(feed(host, loaded, step.cpu(), mask.cpu()), feed(model, cache, step, mask).cpu())


@pytest.mark.parametrize("slug", ["full", "snapkv"])
def test_crop(slug):
    ids, mask = prompts(60, 41)
    model, cache = make(slug)
    steps = forced(2, 20)
    follow(model, cache, ids, mask, steps[:, :2])
    _, other = make(slug)
    follow(model, other, ids, mask, steps)
    other.crop(-18)
    assert other.kept(1) == cache.kept(1) and other.get_seq_length() == 62
    mask = grow(mask, 3)
    close(feed(model, other, steps[:, 2:3], mask), feed(model, cache, steps[:, 2:3], mask))


# -- bytes ---------------------------------------------------------------------------------------------------


def allocated() -> tuple[int, int]:
    """Bytes that tensors on the device asked for, and what the allocator gave them."""
    gc.collect()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return stats["requested_bytes.all.current"], stats["allocated_bytes.all.current"]


@ALL
def test_nbytes_is_what_the_allocator_says(slug):
    ids, mask = prompts(400, 333)
    step, longer = forced(2, 1), grow(mask)
    for _ in range(2):  # the first round leaves workspaces behind
        model, cache = make(slug)
        before = allocated()
        feed(model, cache, ids, mask)
        feed(model, cache, step, longer)
        asked, given = (after - start for after, start in zip(allocated(), before, strict=True))
        planes = [plane for core in cache.paged for _, s in core.segments for plane in s.pool.planes.values()]
        on_pages = sum(plane.nbytes for plane in planes)
        nbytes = cache.nbytes
        del cache, planes
        left = allocated()
    # Tables may lie on the host; they count in `nbytes`, and are next to nothing.
    assert on_pages <= asked <= nbytes < 1.03 * on_pages
    assert given <= asked + 512 * 64  # the allocator rounds each tensor up to 512 bytes
    assert left == before
