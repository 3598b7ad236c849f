"""fast_memory= without spill=: what has no room on the device lies on the host, and says the same.

On the CPU both are one memory: pages are copied all the same, and what is counted is what a device would move.
"""

from functools import partial

import pytest
import torch

import kvfold
from calibrated import SMALL
from elsewhere import life
from families import LIMITED, METHODS
from kvfold import testing
from kvfold.hf.graph import decode_graph
from kvfold.pages import HostMemory
from models import build, feed, follow, grow, subject, tokens

QUEST = "quest(budget=64, page=16, dense=0, group='sum')"
KEPT = ["full", QUEST, "kvfold(budget=0.5)", "h2o(budget=0.5)"]
LIMIT = 500 << 10
TOKEN = 2 * 3 * (2 * 16 + 1) * 4
"""Bytes that a token of the tiny model takes: 2 heads in 3 layers, keys and values of 16 numbers, a position."""


def both(method, *, limit=LIMIT, model=None, **options):
    """A model, and two caches: in memory, and with little of it on the device."""
    model = subject("llama") if model is None else model
    return model, kvfold.Cache(model, method, **options), kvfold.Cache(model, method, fast_memory=limit, **options)


def close(there, here) -> None:
    """The same tokens, and the same logits but for rounding."""
    torch.testing.assert_close(there, here, atol=1e-4, rtol=0)
    assert torch.equal(there.argmax(-1), here.argmax(-1))


# -- the same as in memory -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("slug", METHODS)
def test_every_method_says_what_it_says_in_memory(slug):
    """Two rows of 900 and 860 tokens, and 12 behind them: to the last bit, where a layer's pages are read at once.

    What reads by a mask does not, for pages without tokens to read don't come.
    """
    options = {**({"budget": 0.5} if slug in LIMITED else {}), **SMALL.get(slug, {})}
    if kvfold.parse(slug, **options).shares_layers:
        with pytest.raises(ValueError, match="lets layers share memory"):
            both(slug, **options)
        return
    model, here, there = both(slug, limit=1400 << 10, **options)
    prompt = tokens(900, 860)
    ids, mask, more = prompt["input_ids"], prompt["attention_mask"], testing.steps(2, 12)
    found = [follow(model, cache, ids, mask, more) for cache in (there, here)]
    close(*found)
    assert there.rows.listens("selection") or there.rows.listens("before_attend") or torch.equal(*found)
    assert [core.kept() for core in there.paged] == [core.kept() for core in here.paged]
    assert there.resident_nbytes <= 1400 << 10 and there.fast.written_nbytes > 0


@pytest.mark.parametrize("method", KEPT)
def test_turns_crops_beams_and_copies(method):
    model, *caches = both(method)
    found = [life(model, cache, 1200) for cache in caches]
    for theirs, mine in zip(*found, strict=True):
        close(mine, theirs)
    assert caches[1].resident_nbytes <= LIMIT and caches[1].fast.brought_nbytes > 0


@pytest.mark.parametrize(
    "method", ["quest(budget=8,page=8,dense=0) | kivi(bits=4)", "quest(budget=16,page=16,dense=0)"]
)
def test_a_part_of_which_nothing_is_read(method):
    """All that is chosen lies in the tail that is still exact, so that no page of codes is brought."""
    prompt = tokens(300)
    model, *caches = both(method, limit=400 << 10)
    given = prompt["input_ids"], prompt["attention_mask"], testing.steps(1, 6)
    close(*(follow(model, cache, *given) for cache in caches))


@pytest.mark.parametrize("method", [*KEPT, "kivi(bits=4)"])
def test_in_and_out_of_inference_mode(method):
    """Slots are made in the mode of the first pass, and written in those of later ones."""
    model, *caches = both(method)
    prompt, found = tokens(1200), []
    for cache in caches:
        mask, logits = prompt["attention_mask"], []
        for ids, mode in (
            (prompt["input_ids"], torch.inference_mode), (testing.steps(1, 1), torch.no_grad),
            (testing.steps(1, 9), torch.inference_mode), (testing.steps(1, 1), torch.enable_grad),
        ):  # fmt: skip
            mask = mask if ids is prompt["input_ids"] else grow(mask, ids.shape[1])
            with mode():
                logits.append(model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1].detach().clone())
        found.append(torch.stack(logits))
    close(*found)


@pytest.mark.parametrize("method", KEPT)
def test_generate_with_beams_and_with_chunks(method):
    model, ids = subject("llama"), tokens(1000)["input_ids"]
    for options, chunk in (({"num_beams": 3}, None), ({}, 400)):
        said = [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, do_sample=False,
                **options,
            )
            for cache in both(method, prefill_chunk=chunk)[1:]
        ]  # fmt: skip
        assert torch.equal(*said)


@pytest.mark.parametrize("method", KEPT)
def test_a_file_goes_on_here_and_there(tmp_path, method):
    model, here, there = both(method)
    ids = tokens(1200)["input_ids"]
    mask = torch.ones_like(ids)
    for name, cache in (("here", here), ("there", there)):
        follow(model, cache, ids, mask, testing.steps(1, 3))
        cache.save(tmp_path / name)
    loads = [partial(kvfold.Cache.load, model=model), partial(kvfold.Cache.load, model=model, fast_memory=LIMIT)]
    expected = feed(model, here, testing.steps(1, 1), grow(mask, 4))
    for name in ("here", "there"):
        for load in loads:
            close(feed(model, load(tmp_path / name), testing.steps(1, 1), grow(mask, 4)), expected)
    assert isinstance(load(tmp_path / "here").fast, HostMemory)


@pytest.mark.parametrize("method", ["kivi(bits=4)", "quest(budget=64) | fp8", "windows(form='fp8')"])
def test_windows_and_formats(method):
    """Layouts share the slots; a window stays where it is, and counts."""
    model, here, there = both(method, model=subject("gemma3"))
    ids = tokens(700)["input_ids"]
    mask = torch.ones_like(ids)
    found = [follow(model, cache, ids, mask, testing.steps(1, 20)) for cache in (here, there)]
    torch.testing.assert_close(*found, atol=2e-3, rtol=0)
    assert there.resident_nbytes <= LIMIT and there.fast.beside_nbytes > 0


# -- what is moved ---------------------------------------------------------------------------------------------


def moved(method: str, limit: int, steps: int = 6, tokens_read: int = 3000) -> tuple[float, float, kvfold.Cache]:
    """Bytes up and down of a step behind a prompt."""
    model, _, cache = both(method, limit=limit)
    ids = tokens(tokens_read)["input_ids"]
    mask = torch.ones_like(ids)
    feed(model, cache, ids, mask)
    follow(model, cache, testing.steps(1, 1), grow(mask, 1), testing.steps(1, 3))
    up, down = cache.fast.brought_nbytes, cache.fast.written_nbytes
    follow(model, cache, testing.steps(1, 1), grow(mask, 5), testing.steps(1, steps - 1))
    return (cache.fast.brought_nbytes - up) / steps, (cache.fast.written_nbytes - down) / steps, cache


def test_a_step_moves_what_it_reads_up_and_a_token_down():
    """full: all but what the device has room for; quest: of a budget of 64 tokens what is not there."""
    limit = 300 << 10
    up, down, cache = moved("full", limit)
    dense = 3000 * TOKEN
    assert down == TOKEN and dense - limit <= up <= 1.02 * dense
    few, also, other = moved(QUEST, limit)
    assert also == TOKEN and few <= (64 / 3000) * dense < up / 30
    for each in (cache, other):
        assert each.resident_nbytes <= limit


def test_what_has_room_is_never_moved_up():
    up, down, cache = moved("full", 4 << 20, tokens_read=1000)
    assert (up, down) == (0, TOKEN) and cache.fast.brought_nbytes == 0
    assert cache.fast.written_nbytes == 1010 * TOKEN  # each token once


def test_the_report_has_the_counts():
    _, _, cache = moved("full", 300 << 10)
    found = cache.report().to_dict()["spilled"]
    assert found["fast_memory"] == 300 << 10 and found["disk_nbytes"] == 0
    assert found["host_nbytes"] >= 3000 * TOKEN and found["misses"] > 0
    assert found["brought_nbytes"] == cache.fast.brought_nbytes > 0
    assert cache.report().resident_nbytes == cache.resident_nbytes <= 300 << 10


# -- what can't be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fast_memory": 0}, "fast_memory=0 must be bytes"),
        ({"fast_memory": "much"}, "fast_memory='much' must be bytes"),
        ({"fast_memory": "4KiB"}, "fast_memory=4096 is too little: a page of each of 2 KV heads"),
        ({"fast_memory": "1MiB", "arena": True}, "can't be combined with arena="),
        ({"fast_memory": "1MiB", "method": "minicache"}, "lets layers share memory"),
    ],
)
def test_what_can_not_be_is_refused(options, named):
    given = {**options, "arena": kvfold.Arena(1 << 20)} if "arena" in options else dict(options)
    with pytest.raises(ValueError, match=named):
        kvfold.Cache(subject("llama"), given.pop("method", "full"), **given)


def test_a_batch_without_room_is_refused_before_it_is_read():
    model, _, there = both("full", limit=24 << 10)
    ids = tokens(*[20] * 8)["input_ids"]
    with pytest.raises(ValueError, match="is too little: a page of each of 16 KV heads"):
        feed(model, there, ids, torch.ones_like(ids))


def test_rows_of_another_memory_do_not_join():
    model, here, there = both("full")
    ids = tokens(20)["input_ids"]
    for cache in (here, there):
        feed(model, cache, ids, torch.ones_like(ids))
    for mine, theirs in ((there, here), (here, there)):
        with pytest.raises(ValueError, match="lie in another fast memory"):
            mine.join(theirs)


# -- a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", KEPT)
def test_on_a_gpu(method):
    """The same tokens as with everything there, through a crop and beams, and no more memory than the limit."""
    model = build("llama").to("cuda")
    model, here, there = both(method, model=model)
    ids = tokens(1200)["input_ids"].to("cuda")
    mask, found = torch.ones_like(ids), ([], [])
    for cache, logits in zip((here, there), found, strict=True):
        logits.append(follow(model, cache, ids, mask, testing.steps(1, 12).to("cuda")))
        cache.crop(-5)
        cache.reorder_cache(torch.zeros(2, dtype=torch.int64, device="cuda"))
        wide = grow(mask, 8).expand(2, -1)
        logits.append(feed(model, cache, testing.steps(2, 1).to("cuda"), wide))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=0)
        assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
    assert there.resident_nbytes <= LIMIT and there.fast.brought_nbytes > 0
    assert there.paged[0].segments[0][1].pool.planes["keys"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_what_a_gpu_can_not_read_from_slots_is_refused():
    model = build("llama").to("cuda")
    with pytest.raises(ValueError, match="holds them in another format"):
        kvfold.Cache(model, "fp8", fast_memory="1MiB")
    cache = kvfold.Cache(model, fast_memory="1MiB")
    with pytest.raises(ValueError, match="fast_memory=1048576: "), decode_graph(model, cache):
        pass
