"""fast_memory= and spill=: a cache that is larger than the memory it may take says the same, and leaves nothing."""

import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import kvfold
from calibrated import SMALL
from elsewhere import life
from families import LIMITED, METHODS
from kvfold import testing
from kvfold.pages import SpillFull
from kvfold.pages.spill import UNIT
from models import build, feed, follow, grow, subject, tokens

ROOT = Path(__file__).parents[2]
KEEPS_ALL = ["full", "quest(budget=64, page=16)", "fp8", "kivi(bits=4)", "quest(budget=64) | fp8"]


def steps(rows: int, count: int) -> torch.Tensor:
    return testing.steps(rows, count)


def both(folder, method, *, limit="1400KiB", **options):
    """A model, and two caches: in memory, and with little of it."""
    model = subject("llama")
    return model, kvfold.Cache(model, method, **options), spilled(folder, method, limit=limit, **options)


def spilled(folder, method, *, limit="1400KiB", **options):
    return kvfold.Cache(subject("llama"), method, fast_memory=limit, spill=folder, **options)


def moved(cache) -> bool:
    """Whether some of it had to go, and came again."""
    return cache.fast.residency.brought_nbytes > 0


# -- the same as in memory -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("slug", METHODS)
def test_every_method_says_what_it_says_in_memory(tmp_path, slug):
    """Two rows of 900 and 860 tokens, and 12 behind them: to the last bit, for all of a layer has room.

    Methods that read few do not to the last bit.
    """
    options = {**({"budget": 0.5} if slug in LIMITED else {}), **SMALL.get(slug, {})}
    if kvfold.parse(slug, **options).shares_layers:
        with pytest.raises(ValueError, match="lets layers share memory"):
            both(tmp_path, slug, **options)
        return
    model, here, there = both(tmp_path, slug, **options)
    prompt = tokens(900, 860)
    found = [
        follow(model, cache, prompt["input_ids"], prompt["attention_mask"], steps(2, 12)) for cache in (here, there)
    ]
    if there.rows.listens("selection"):  # which reads by a mask from disk what it reads as single tokens in memory
        torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    else:
        assert torch.equal(*found)
    assert [core.kept() for core in there.paged] == [core.kept() for core in here.paged]
    assert there.resident_nbytes <= 1400 << 10 and abs(there.nbytes - here.nbytes) <= 0.1 * here.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("method", KEEPS_ALL)
def test_a_layer_that_has_no_room_is_read_in_stretches(tmp_path, method):
    model, here, there = both(tmp_path, method, limit=10 * UNIT)
    ids = tokens(2000)["input_ids"]
    mask = torch.ones_like(ids)
    found = [follow(model, cache, ids, mask, steps(1, 4)) for cache in (here, there)]
    torch.testing.assert_close(*found, atol=2e-3 if "kivi" in method else 1e-4, rtol=0)
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
    assert moved(there) and there.resident_nbytes <= 10 * UNIT


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "quest(budget=64, page=16)"])
def test_turns_crops_beams_and_copies(tmp_path, method):
    model, *caches = both(tmp_path, method)
    found = [life(model, cache, 1500) for cache in caches]
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert moved(caches[1]) and caches[1].resident_nbytes <= 1400 << 10


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "quest(budget=64, page=16)"])
def test_generate_with_beams_and_with_chunks(tmp_path, method):
    model, ids = subject("llama"), tokens(1200)["input_ids"]
    for options, chunk in (({"num_beams": 3}, None), ({}, 500)):
        said = [
            model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, do_sample=False,
                **options,
            )
            for cache in both(tmp_path, method, prefill_chunk=chunk)[1:]
        ]  # fmt: skip
        assert torch.equal(*said)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "quest(budget=64, page=16)", "h2o(budget=0.5)"])
def test_a_file_goes_on_here_and_there(tmp_path, method):
    """Saved from disk and loaded to it, or to memory, or the other way round."""
    model, here, there = both(tmp_path, method)
    ids = tokens(1500)["input_ids"]
    mask = torch.ones_like(ids)
    for name, cache in (("here", here), ("there", there)):
        follow(model, cache, ids, mask, steps(1, 3))
        cache.save(tmp_path / name)
    loads = {
        "memory": partial(kvfold.Cache.load, model=model),
        "disk": partial(kvfold.Cache.load, model=model, fast_memory="1400KiB", spill=tmp_path),
    }
    expected = feed(model, here, steps(1, 1), grow(mask, 4))
    for name in ("here", "there"):
        for load in loads.values():
            loaded = load(tmp_path / name)
            torch.testing.assert_close(feed(model, loaded, steps(1, 1), grow(mask, 4)), expected, atol=1e-5, rtol=0)
    assert load(tmp_path / "here").resident_nbytes <= 1400 << 10


def test_what_is_beside_the_pages_counts(tmp_path):
    """An index stays in memory, and pages have as much less."""
    model, _, there = both(tmp_path, "quest(budget=64, page=4)")
    ids = tokens(1500)["input_ids"]
    feed(model, there, ids, torch.ones_like(ids))
    memory = there.fast
    index = sum(
        segment.index.nbytes for core in there.paged for _, segment in core.segments if hasattr(segment, "index")
    )
    assert index > 10_000 and memory.beside_nbytes >= index
    assert memory.residency.capacity * UNIT <= (1400 << 10) - memory.beside_nbytes
    assert there.report().resident_nbytes == there.resident_nbytes <= 1400 << 10
    assert there.report().to_dict()["spilled"]["brought_nbytes"] == memory.residency.brought_nbytes


# -- what can't be -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"spill": "."}, "spill='.' goes with fast_memory="),
        ({"fast_memory": 0, "spill": "."}, "fast_memory=0 must be bytes"),
        ({"fast_memory": 0.5, "spill": "."}, "fast_memory=0.5 must be bytes"),
        ({"fast_memory": "much", "spill": "."}, "fast_memory='much' must be bytes"),
        ({"fast_memory": "1MiB", "spill": "no/such/folder"}, "spill='no/such/folder' is not a folder"),
        ({"fast_memory": "1MiB", "spill": __file__}, "is not a folder"),
        ({"fast_memory": "1MiB", "spill": 7}, "spill=7 must be the path of a folder"),
        ({"fast_memory": "64KiB", "spill": "."}, "fast_memory=65536 is too little: a page of each of 2 KV heads"),
        ({"fast_memory": "1MiB", "spill": ".", "arena": True}, "can't be combined with arena="),
        ({"fast_memory": "1MiB", "spill": ".", "method": "minicache"}, "lets layers share memory"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_can_not_be_is_refused_before_anything_is_made(tmp_path, monkeypatch, options, named):
    monkeypatch.chdir(tmp_path)
    given = {**options, "arena": kvfold.Arena(1 << 20)} if "arena" in options else options
    with pytest.raises(ValueError, match=named):
        kvfold.Cache(subject("llama"), given.pop("method", "full"), **given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_model_on_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"spill=.* is for models on the CPU"):
        kvfold.Cache(build("llama").to("cuda"), fast_memory="1MiB", spill=tmp_path)


def test_rows_of_another_file_do_not_join(tmp_path):
    model, here, there = both(tmp_path, "full")
    ids = tokens(20)["input_ids"]
    for cache in (here, there):
        feed(model, cache, ids, torch.ones_like(ids))
    before = there.kept(0)
    for mine, theirs in ((there, here), (here, there), (there, spilled(tmp_path, "full"))):
        with pytest.raises(ValueError, match="lie in another fast memory"):
            mine.join(theirs)
    assert there.kept(0) == before


# -- the disk and the process --------------------------------------------------------------------------------------


def limited_files(nbytes: int | None) -> None:
    """No file of this process may be longer: a real limit, whose error is a full disk's."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if nbytes is None else nbytes, hard))


@pytest.mark.parametrize("method", ["full", "quest(budget=64, page=16)"])
def test_a_disk_without_room_for_a_prompt_leaves_a_cache_as_it_was(tmp_path, method):
    model, here, there = both(tmp_path, method)
    ids = tokens(1500)["input_ids"]
    mask = torch.ones_like(ids)
    limited_files(8 * UNIT)
    try:
        with pytest.raises(SpillFull, match=f"spill='{tmp_path}' has no room for [0-9]+ bytes more"):
            feed(model, there, ids, mask)
    finally:
        limited_files(None)
    assert there.get_seq_length() == 0 and there.fast.file.nbytes == 0
    assert torch.equal(feed(model, there, ids, mask), feed(model, here, ids, mask))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 blocks."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={40 * UNIT}", "tmpfs", folder], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "quest(budget=64, page=16)"])
def test_a_disk_that_is_full_when_a_token_comes_leaves_a_cache_as_it_was(small_disk, method):
    """It takes the prompt, and is full in the middle of the answer: with room again the same token comes."""
    model, here, there = both(small_disk, method)
    ids, forced, failed = tokens(1000)["input_ids"], steps(1, 60), 0
    mask = torch.ones_like(ids)
    assert torch.equal(feed(model, there, ids, mask), feed(model, here, ids, mask))
    with (small_disk / "others").open("wb") as others:  # somebody else takes what is left
        left = os.statvfs(small_disk)
        os.posix_fallocate(others.fileno(), 0, left.f_bavail * left.f_frsize)
    for at, token in enumerate(forced.T):
        mask = grow(mask)
        try:
            got = feed(model, there, token[:, None], mask)
        except SpillFull as full:
            failed, before = failed + 1, there.kept(0)
            assert full.free == 0 < full.needed and str(small_disk) in str(full)
            assert there.get_seq_length() == 1000 + at == there.paged[-1].width and len(before[0][0]) == 1000 + at
            (small_disk / "others").unlink()
            got = feed(model, there, token[:, None], mask)
        torch.testing.assert_close(got, feed(model, here, token[:, None], mask), atol=1e-5, rtol=0)
    assert failed == 1


CHILD = """
import sys, time, pathlib
sys.path.insert(0, {tests!r})
import torch, kvfold
from elsewhere import life
from models import build, tokens, feed
if {named}:
    unlink = pathlib.Path.unlink
    def killed(path, **given):
        if path.suffix == ".part":
            print("ready", flush=True)
            time.sleep(600)
        unlink(path, **given)
    pathlib.Path.unlink = killed
model = build("llama")
cache = kvfold.Cache(model, "full", fast_memory="1MiB", spill={folder!r})
ids = tokens(2000)["input_ids"]
feed(model, cache, ids, torch.ones_like(ids))
assert cache.fast.file.nbytes > 1 << 20
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
def test_a_killed_process_leaves_nothing_after_the_next_start(tmp_path, named):
    """Killed while it holds its file, or in the moment when that has a name."""
    code = CHILD.format(tests=str(ROOT / "tests"), folder=str(tmp_path), named=named)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    assert len(list(tmp_path.iterdir())) == int(named)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert len(list(tmp_path.iterdir())) == int(named)
    spilled(tmp_path, "full")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_long_context_decodes_from_disk_within_its_memory(tmp_path):
    """16,384 tokens, four times the limit: the script ends with 1 where a token is another, or memory is too much."""
    words = ["--context", "16384", "--layers", "4", "--tokens", "6", "--spill", str(tmp_path)]
    report = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/spill.py"), *words, "--json", str(report)], capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    for method in ("full", "quest(budget=1024)"):
        here, there = (found["rows"][f"{method}, {where}"] for where in ("in memory", "from disk"))
        assert there["said"] == here["said"] and len(set(there["said"])) > 1
        assert here["nbytes"] > 4 * found["limit"] >= 4 * there["held"]
        assert there["decode_peak"] < here["decode_peak"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
