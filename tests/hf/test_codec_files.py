"""Caches saved in a codec: what comes back, what stays exact, and files that are damaged or made up."""

import os
import signal
import warnings
from functools import cache as once
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvfold
from cache_files import parts, rewrite
from kvfold.codecs import CacheGen
from kvfold.formats import POSITION
from kvfold.hf.saving import sealed
from kvfold.hf.saving.packed import planes_of
from kvfold.pages import Arena
from models import feed, greedy, grow, subject, tokens

pytest.importorskip("constriction")
KINDS = {
    "dense": ("llama", "full"), "ragged": ("llama", "h2o(budget=0.5)"), "window": ("gemma3", "snapkv(budget=0.5)"),
    "state": ("qwen3-next", "full"), "coded": ("llama", "kivi(group=8, residual=32)"), "shared": ("llama", "minicache"),
}  # fmt: skip


def read(kind, dtype=torch.float32, lengths=(90, 61)):
    """A cache that has read two prompts and two tokens."""
    name, method = KINDS[kind]
    model = subject(name, dtype)
    cache = kvfold.Cache(model, method)
    greedy(model, cache, *tokens(*lengths).values(), 3)
    return model, cache


@once
def content(kind: str, codec: str = "cachegen") -> bytes:
    import tempfile

    _, cache = read(kind)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(path := Path(folder) / "c", codec=codec)
        return path.read_bytes()


def placed(kind, folder):
    path = folder / "c"
    path.write_bytes(content(kind))
    return subject(KINDS[kind][0]), path


def refused(model, path, message):
    """Loading fails with `message`, names the file, and takes no page of an arena."""
    room = Arena(1 << 30)
    with pytest.raises(ValueError, match=message) as caught:
        kvfold.Cache.load(path, model, arena=room)
    assert repr(str(path)) in str(caught.value) and not room.pools


def stored(cache, folder):
    """Header and tensors as a plain file has them."""
    cache.save(folder / "plain")
    return parts(folder / "plain")


# -- what comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_keys_and_values_change_and_little(kind, dtype, tmp_path):
    if dtype != torch.float32 and kind not in ("dense", "window"):
        return
    model, cache = read(kind, dtype)
    cache.save(tmp_path / "c", codec="cachegen(level=3)")
    header, planes = stored(cache, tmp_path)
    coded = parts(tmp_path / "c")[0]["codec"]["planes"]
    loaded = kvfold.Cache.load(tmp_path / "c", model)
    again, found = stored(loaded, tmp_path)
    assert again == header and found.keys() == planes.keys()
    assert bool(coded) == (kind != "coded") and {name.split(".")[-1] for name in coded} <= {"keys", "values"}
    for name, plane in planes.items():
        if name not in coded:
            assert torch.equal(found[name], plane), name
            continue
        assert found[name].dtype == plane.dtype and not torch.equal(found[name], plane), name
        step = float(plane.abs().max()) / 30  # half of a step, and what rounding to 8 bits adds
        assert float((found[name].float() - plane.float()).abs().max()) <= step * 1.12, name
        if name.count(".") == 2:
            first = planes[f"{name.rsplit('.', 1)[0]}.{POSITION}"] < 4
            assert bool(first.any()) and torch.equal(found[name][first], plane[first]), name


def test_windows_that_hold_the_start_of_a_text_keep_it(tmp_path):
    """A window of 8 after 6 and 5 tokens, 2 of 4 first ones given: a padded row's text begins behind its padding."""
    model = subject("gemma3")
    cache = kvfold.Cache(model)
    feed(model, cache, *tokens(6, 5).values())
    header, planes = stored(cache, tmp_path)
    rows = {name: raw for name, _, _, raw in planes_of(CacheGen(first=4), header, planes)}
    assert rows["0.keys"].view(2, 2, 6)[0, 0].tolist() == [True] * 4 + [False] * 2
    assert rows["0.keys"].view(2, 2, 6)[1, 1].tolist() == [False] + [True] * 4 + [False]


def test_goes_on_with_nearly_the_same_logits(tmp_path):
    """A random model's heads hang on few keys: it is told apart by what a trained one does not notice."""
    model, cache = read("dense")
    step, mask = torch.tensor([[7], [11]]), grow(tokens(90, 61)["attention_mask"], 3)
    far = {}
    for codec in ("level=1", "level=3", "level=3, per_head=True", "group=1"):
        cache.save(tmp_path / "c", codec=f"cachegen({codec})")
        found = [feed(model, kvfold.Cache.load(tmp_path / "c", model), step, mask).log_softmax(-1) for _ in range(2)]
        assert torch.equal(*found)
        truth = feed(model, cache.fork(), step, mask).log_softmax(-1)
        far[codec] = float((truth.exp() * (truth - found[0])).sum(-1).mean())
    assert far["level=1"] > far["level=3"] > far["level=3, per_head=True"] > far["group=1"] > 0
    assert far["level=3, per_head=True"] < 0.2 and far["group=1"] < 0.02


@pytest.mark.parametrize("kind", ["dense", "ragged", "window"])
def test_what_was_loaded_is_saved_as_it_was(kind, tmp_path):
    model, path = placed(kind, tmp_path)
    kvfold.Cache.load(path, model).save(tmp_path / "again", codec="cachegen")
    (header, planes), (again, found) = parts(path), parts(tmp_path / "again")
    assert again == header and found.keys() == planes.keys()
    assert all(torch.equal(found[name], plane) for name, plane in planes.items())


def test_bytes(tmp_path):
    _, cache = read("dense", lengths=(480,))
    sizes = []
    for level in (1, 2, 3):
        cache.save(tmp_path / "c", codec=f"cachegen(level={level})")
        sizes.append((tmp_path / "c").stat().st_size)
    cache.save(tmp_path / "c")
    assert sizes[0] < sizes[1] <= sizes[2] < (tmp_path / "c").stat().st_size * 0.35  # of float32, header and all


# -- files that are damaged or made up -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "window"])
@given(data=st.data())
def test_every_flipped_bit_is_noticed(kind, data, tmp_path_factory):
    model, path = placed(kind, tmp_path_factory.mktemp("flipped"))
    whole = bytearray(content(kind))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    refused(model, path, "is damaged|is not a kvfold cache|was written by format")
    path.write_bytes(content(kind)[:at])
    refused(model, path, "is not a kvfold cache, or only a part of one")


def of_plane(**change):
    return lambda header, _: header["codec"]["planes"]["1.0.keys"].update(change)


def tensor(name, change):
    return lambda _, planes: planes.update({f"1.0.keys.{name}": change(planes.get(f"1.0.keys.{name}")).contiguous()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.update(codec=3), "codec, has 3 where an object must be"),
        (lambda header, _: header.update(codec=None), "tensor '1.0.keys.*' of no format|has keys=None"),
        (lambda header, _: header["codec"].update(codec="pickle"), "codec='pickle' must be one of cachegen"),
        (lambda header, _: header["codec"]["options"].update(level=9), "level=9 must be an int"),
        (lambda header, _: header["codec"]["options"].pop("level"), "options=.*must be level, per_head"),
        (lambda header, _: header["codec"]["planes"].pop("1.0.keys"), "has keys=None"),
        (lambda header, _: header["codec"]["planes"].update(x={}), "plane 'x' has shape=None, which must be a list"),
        (lambda _, planes: planes.update({"1.0.keys": torch.zeros(3)}), "plane '1.0.keys' is there, and its code"),
        (of_plane(shape=[10**9, 10**9]), "which must be that of"),
        (of_plane(shape=[2**40, 16], rows=1, counts=[2**31 - 1] * 512), "which must be"),
        (of_plane(shape=[2**31 - 1, 16], rows=1, counts=[2**31 - 1]), "of which at most 64 times are read"),
        (of_plane(shape=[310, 0]), "has shape="),
        (of_plane(shape=[-310, -16]), "has shape=.*must be ints"),
        (of_plane(rows=0), "rows=0, which must be an int"),
        (of_plane(rows=3), "shape=.*that of 4 heads of 3 rows"),
        (of_plane(counts="4"), "counts='4', which must be a list"),
        (of_plane(counts=[92, 92, 63, 62]), "shape=.*that of 309 tokens"),
        (of_plane(counts=[90, 94, 63, 63]), "one maximum for heads of different lengths"),
        (of_plane(bins=16), "words, tables and maxima="),
        (of_plane(bins=3), "bins=3, which must be an int in"),
        (of_plane(joint=False), "words, tables and maxima="),
        (of_plane(joint=1), "joint=1, which must be true or false"),
        (of_plane(group=10), "a code of .*which must be .*anchors"),
        (of_plane(dtype="bfloat16"), "raw="),
        (of_plane(dtype="load"), "dtype='load' must be one of"),
        (tensor("words", lambda x: x[:-1]), "(are not those of|zero word)"),
        (tensor("words", lambda x: torch.cat([x, x.new_zeros(1)])), "zero word"),
        (tensor("words", lambda x: x.long()), "words, tables and maxima="),
        (tensor("tables", lambda x: x.flip(1)), "must grow from 0"),
        (tensor("tables", lambda x: x[:-1]), "words, tables and maxima="),
        (tensor("maxima", lambda x: -x), "a maximum that is no number >= 0"),
        (tensor("maxima", lambda x: x * float("nan")), "a maximum that is no number >= 0"),
        (tensor("maxima", lambda x: x[:-1]), "words, tables and maxima="),
        (tensor("raw", lambda x: x[:-1]), "raw="),
        (tensor("raw_at", lambda x: x - 5), "raw_at, which must be places of"),
        (tensor("raw_at", lambda x: x + 10**6), "raw_at, which must be places of"),
        (tensor("raw_at", lambda x: x * 0), "raw_at, which must be places of"),
        (tensor("more", lambda x: torch.zeros(1)), "a code of .*more"),
    ],
)  # fmt: skip
def test_a_code_that_nobody_wrote(change, message, tmp_path):
    model, path = placed("dense", tmp_path)
    rewrite(path, change)
    refused(model, path, f"is damaged: .*({message})")


def test_without_the_library(tmp_path, monkeypatch):
    model, path = placed("dense", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    for use in (lambda: kvfold.Cache.load(path, model), lambda: read("dense")[1].save(path, codec="cachegen")):
        with pytest.raises(ImportError, match=r"needs constriction: pip install 'kvfold\[codec\]'"):
            use()
    assert path.read_bytes() == content("dense")


@pytest.mark.parametrize("codec", [None, "cachegen"])
def test_killed_in_the_middle_of_saving(codec, tmp_path):
    """The writer is killed when half of a file is there: the old one is whole, and what it left is not taken for it."""
    model, path = placed("dense", tmp_path)
    _, cache = read("dense")

    def half(tensors, name, metadata):
        save_file(tensors, name, metadata=metadata)
        os.truncate(name, os.stat(name).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    save_file = sealed.save_file
    with warnings.catch_warnings():  # Python 3.12 warns of threads, which a child that writes a file does not need
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            sealed.save_file = half
            cache.save(path, codec=codec)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == content("dense") and len(list(tmp_path.iterdir())) == 2
    assert kvfold.Cache.load(path, model).kept(1) == cache.kept(1)
