"""Cache files that are damaged or made up: refused by name before anything is allocated, whatever is wrong."""

import copy
import os
import stat
from functools import cache as once
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvfold
from cache_files import parts, rewrite, write
from kvfold.formats import LOG_MASS, POSITION
from kvfold.hf.saving.sealed import read_sealed
from kvfold.pages import Arena
from models import feed, greedy, subject, tokens

KINDS = {
    "dense": ("llama", "h2o(budget=0.5)"), "mass": ("llama", "kvmerger(budget=0.5)"),
    "window": ("gemma3", "snapkv(budget=0.5)"), "state": ("qwen3-next", "full"),
    "coded": ("llama", "kivi(group=8, residual=32)"), "shared": ("llama", "minicache"),
    "reading": ("llama", "specpc(budget=0.5, window=4, kernel=3)"),
}  # fmt: skip
"""A cache for each kind of thing that files hold, by model and method."""


@once
def content(kind: str) -> bytes:
    """The file of a cache that has read a prompt and two tokens."""
    import tempfile

    name, method = KINDS[kind]
    model = subject(name)
    cache = kvfold.Cache(model, method)
    greedy(model, cache, *tokens(40, 30).values(), 3)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(path := Path(folder) / "c")
        return path.read_bytes()


def placed(kind: str, folder: Path) -> tuple[torch.nn.Module, Path]:
    path = folder / "c"
    path.write_bytes(content(kind))
    return subject(KINDS[kind][0]), path


def refused(model, path, message: str, **options) -> None:
    """Loading fails with `message`, names the file, and takes no page of an arena."""
    room = Arena(1 << 30)
    with pytest.raises(ValueError, match=message) as caught:
        kvfold.Cache.load(path, model, arena=room, **options)
    assert repr(str(path)) in str(caught.value) and not room.pools


# -- damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_flipped_bit_is_noticed(kind, data, tmp_path_factory):
    model, path = placed(kind, tmp_path_factory.mktemp("flipped"))
    whole = bytearray(content(kind))
    length = 8 + int.from_bytes(whole[:8], "little")
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(0, length - 1))  # the header as often as all else
    for at in data.draw(st.lists(places, min_size=1, max_size=3, unique=True)):
        whole[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    refused(model, path, "is damaged|is not a kvfold cache|was written by format")


def test_a_bit_of_every_byte_of_a_header_is_noticed(tmp_path):
    _, path = placed("dense", tmp_path)
    whole = content("dense")
    for at in range(8 + int.from_bytes(whole[:8], "little")):
        changed = bytearray(whole)
        changed[at] ^= 1 << (at * 5 % 8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"this (is damaged|is not a kvfold cache|was written by format)"):
            read_sealed(path, "this")


@pytest.mark.parametrize("kind", ["dense", "window"])
def test_a_file_with_more_or_less_at_its_end_is_refused(kind, tmp_path):
    model, path = placed(kind, tmp_path)
    for changed in (content(kind) + b"\0", content(kind)[:-1], content(kind)[: len(content(kind)) // 2]):
        path.write_bytes(changed)
        refused(model, path, "is not a kvfold cache, or only a part of one")


def test_a_file_without_a_digest_is_refused(tmp_path):
    model, path = placed("dense", tmp_path)
    rewrite(path, lambda header, planes: None, sealed=False)
    refused(model, path, "is damaged: its SHA-256 is not there")


# -- headers that somebody made up ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": {"seen": [-5, -5], "prompt": [0, 0], "width": 44}}, r"rows, has seen=\[-5, -5\], which must be ints"),
        ({"rows": {"seen": [2, 2], "prompt": [3, 0], "width": 44}}, "has prompt=.*must be no more than seen"),
        ({"rows": {"seen": [42, 32], "prompt": [40, 30], "width": 10**18}}, r"width=10{18}, which must"),
        ({"rows": {"seen": [42, 32], "prompt": [40, 30], "width": 3}}, r"has width=3, which must be an int in \[42"),
        ({"rows": {"seen": [42], "prompt": [40], "width": 42}}, "layer 0 has opened="),
        ({"rows": {"seen": [4, 4], "prompt": [4, 4], "width": 4}}, "position=[4-9] of a token, which its row"),
        ({"rows": None}, "has None where an object must be"),
        ({"rows": {"seen": "42", "prompt": [], "width": 0}}, "has seen='42', which must be a list"),
        ({"layers": None}, "has layers=None, which must be a list"),
        ({"layers": [None] * 3}, "layer 0 has None where an object must be"),
        ({"layers": []}, "belongs to no layer"),
        ({"groups": []}, r"has groups=\[\], which must be one of all rows"),
        ({"groups": [{"method": 3, "rows": None, "names": []}]}, "group 0 has method=3, which must be a text"),
        ({"groups": [{"method": "full()", "rows": [0, 0], "names": []}] * 2}, "of which each of the 2 rows is in one"),
        ({"groups": [{"method": "full()", "rows": None, "names": ["lost"]}]}, "has set 'lost', which no layer has"),
        ({"prefill_chunk": 0}, "has prefill_chunk=0, which must be an int"),
        ({"model": None}, "has model=None, which must be a text"),
        ({"fields": []}, r"its header, fields, has \[\] where an object must be"),
        ({"reading": {"surplus": 0, "fixed": 0}}, "reading=.*must be what the tensors"),
    ],
)  # fmt: skip
def test_a_header_by_itself(change, message, tmp_path):
    model, path = placed("dense", tmp_path)
    rewrite(path, lambda header, _: header.update(change))
    refused(model, path, f"(is damaged|can't be made).*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [1, 16, 16]}, "counts="),
        ({"shape": [2, 16, 8]}, "values="),
        ({"shape": [2, 16, 0]}, "shape=.*must be heads and the sizes"),
        ({"shape": [10**9, 16, 16]}, "counts="),
        ({"shape": None}, "shape=None, which must be null where there are no formats"),
        ({"dtype": "bfloat16"}, "keys=.*float32.* must be .*bfloat16"),
        ({"dtype": "save"}, "dtype='save' must be one of float64"),
        ({"dtype": ["float32"]}, "dtype="),
        ({"opened": [0, 7]}, r"opened=\[0, 7\], which must be ints in \[0, 0\]"),
        ({"ordered": 1}, "ordered=1, which must be true or false"),
        ({"formats": []}, "shape=.*, which must be null where there are no formats"),
        ({"formats": [], "shape": None, "opened": []}, "tensor '0.*' of no format"),
        ({"formats": [3]}, "3 where an object must be"),
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_that_does_not_fit_its_tensors(change, message, tmp_path):
    model, path = placed("dense", tmp_path)
    rewrite(path, lambda header, _: header["layers"][1].update(change))
    refused(model, path, f"is damaged: layer 1.* has (a )?{message}")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dense", {"format": "pickle"}, "format='pickle' is not one of .*dense"),
        ("dense", {"format": ["dense"]}, "format="),
        ("dense", {"options": None}, "options=None of dense must be dtype, page_size"),
        ("dense", {"options": {"page_size": 16}}, "options=.*must be dtype, page_size"),
        ("dense", {"options": {"dtype": "load", "page_size": 16}}, "dtype='load' must be one of"),
        ("dense", {"options": {"dtype": None, "page_size": "16"}}, "page_size='16' of dense must be int"),
        ("dense", {"options": {"dtype": None, "page_size": True}}, "page_size=True of dense must be int"),
        ("dense", {"options": {"dtype": None, "page_size": 0}}, "page_size=0 must be an int >= 1"),
        ("dense", {"options": {"dtype": None, "page_size": 4_000_000}}, "page_size=4000000, so .* pages with room for"),
        ("dense", {"of": "2.0"}, "of='2.0', which is no segment before it"),
        ("dense", {"of": 3}, "of=3, which is no segment before it"),
        ("dense", {"of": "0.0"}, "of='0.0', whose pages it can't hold"),
        ("dense", {"counts": [[1, 1], [1, 1]]}, "keys="),
        ("coded", {"coded": [[1, 1], [1, 1]]}, "coded=.* must be multiples of group=8"),
    ],
)  # fmt: skip
def test_a_format_that_does_not_fit_its_tensors(kind, change, message, tmp_path):
    model, path = placed(kind, tmp_path)
    rewrite(path, lambda header, _: header["layers"][1]["formats"][0].update(change))
    refused(model, path, f"is damaged: layer 1.* has {message}")


@pytest.mark.parametrize("kind", ["dense", "mass", "coded"])
@pytest.mark.parametrize("name", ["keys", POSITION, LOG_MASS])
def test_a_tensor_that_lacks(kind, name, tmp_path):
    model, path = placed(kind, tmp_path)
    if name == LOG_MASS and kind != "mass":
        return

    def change(header, planes):
        for plane in [plane for plane in planes if plane.split(".")[-1] == name]:
            del planes[plane]

    rewrite(path, change)
    refused(model, path, f"is damaged: .*{name}")


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "message"),
    [
        ("dense", "1.0.position", lambda x: x - 50, "layer 1 has position=-50"),
        ("dense", "1.0.position", lambda x: x + 500, "layer 1 has position=.* of a token, which its row has not read"),
        ("coded", "1.0.tail.position", lambda x: x + 500, "layer 1 has position="),
        ("dense", "1.0.position", lambda x: x.long(), "layer 1 has position="),
        ("dense", "1.0.keys", lambda x: x[:-1], "layer 1 has keys="),
        ("dense", "1.7.keys", lambda x: torch.zeros(3), "layer 1 has a tensor '7.keys' of no format"),
        ("dense", "1.0.more", lambda x: torch.zeros(3), "layer 1 has more="),
        ("dense", "9.0.keys", lambda x: torch.zeros(3), "tensor '9.0.keys' belongs to no layer"),
        ("window", "0.keys", lambda x: x[:1], "layer 0 has tensors of"),
        ("window", "0.keys", lambda x: x[..., 0], "layer 0 has .*not those of the same tokens"),
        ("window", "0.more", lambda x: torch.zeros(2), "layer 0 has a tensor 'more', which such a layer does not have"),
        ("state", "0.conv_states.0", lambda x: x[:1], "layer 0 has tensors of"),
        ("state", "0.conv_states.7", lambda x: torch.zeros(2), "layer 0 has a tensor 'conv_states.7'"),
        ("reading", "reading.valid", lambda x: x.int(), "reading, has valid="),
        ("reading", "reading.valid", lambda x: torch.zeros_like(x), "reading, has other tokens than the"),
        ("reading", "reading.places", lambda x: x + 500, "reading, has places="),
        ("reading", "reading.given", lambda x: x[:1], "reading, has given="),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit(kind, name, tensor, message, tmp_path):
    model, path = placed(kind, tmp_path)
    rewrite(path, lambda _, planes: planes.update({name: tensor(planes.get(name)).contiguous()}))
    refused(model, path, f"is damaged: .*{message}")


def test_a_large_page_costs_no_more_than_the_file_tells(tmp_path):
    """Rows of many tokens may lie on large pages; room for 64 times what is there is refused, by name."""
    model, path = subject("llama"), tmp_path / "c"
    cache = kvfold.Cache(model)
    feed(model, cache, *tokens(40, 30).values())
    cache.save(path)

    def pages(size):
        return lambda header, _: [x["formats"][0]["options"].update(page_size=size) for x in header["layers"]]

    rewrite(path, pages(1024))
    assert kvfold.Cache.load(path, model).kept(1) == cache.kept(1)
    rewrite(path, pages(4096))
    refused(model, path, "layer 0 has page_size=4096, so 4 pages with room for 64 times the 140 tokens")


def test_a_header_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("kvfold.hf.saving.sealed.HEADER_LIMIT", 100)
    with pytest.raises(ValueError, match=r"a header of \d+ bytes is more than 100"):
        kvfold.Cache(subject("llama")).save(tmp_path / "c")
    assert not list(tmp_path.iterdir())
    model, path = placed("dense", tmp_path)
    refused(model, path, r"has a header of \d+ bytes, of which at most 100 are read")


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("0.0")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


def leaves(said: object, path: tuple = ()):
    """The places of everything in a header but what names the model."""
    parts_ = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    for name, value in parts_:
        if name not in ("fields", "version"):
            yield (*path, name)
            yield from leaves(value, (*path, name))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None)
def test_whatever_a_header_says_it_is_refused_or_loaded(kind, data, tmp_path_factory):
    """No error but ValueError, and none without the file's name; what is loaded can be saved and looked at."""
    model, path = placed(kind, tmp_path_factory.mktemp("made"))
    header, planes = parts(path)
    changed = copy.deepcopy(header)
    for _ in range(data.draw(st.integers(1, 2))):
        *before, last = data.draw(st.sampled_from(sorted(leaves(changed), key=str)))
        spot = changed
        for name in before:
            spot = spot[name]
        if data.draw(st.booleans()):
            spot[last] = data.draw(JSON)
        else:
            del spot[last]
    write(path, changed, planes)
    try:
        loaded = kvfold.Cache.load(path, model)
    except ValueError as error:
        assert repr(str(path)) in str(error)
    else:
        assert loaded.nbytes and loaded.report() and loaded.get_seq_length() >= 0
        loaded.save(path)


# -- names of models and files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "slug", "option", "name"),
    [
        ("speckv(draft='attacker/model')", "speckv", "draft", "attacker/model"),
        ("specpc(draft='/tmp/model')", "specpc", "draft", "/tmp/model"),
        ("snapkv(budget=0.5) | speckv(draft='attacker/model')", "speckv", "draft", "attacker/model"),
        ("adakv(score=\"headkv(calibration='/etc/passwd')\")", "headkv", "calibration", "/etc/passwd"),
        ("duoattention(calibration='../gates.tsv')", "duoattention", "calibration", "../gates.tsv"),
        ("attention-gate(calibration='shipped:../../x')", "attention-gate", "calibration", "shipped:../../x"),
    ],
)
def test_a_file_has_nothing_loaded_by_itself(method, slug, option, name, tmp_path):
    model, path = placed("dense", tmp_path)
    rewrite(path, lambda header, _: header["groups"][0].update(method=method, names=[]))
    refused(model, path, f"{slug} has {option}='{name}' loaded, which a file can't ask for by itself")
    refused(model, path, f"has {option}='{name}' loaded", allow=["another"])


def test_what_the_caller_names_is_allowed(tmp_path):
    model, path = placed("dense", tmp_path)
    rewrite(path, lambda header, _: header["groups"][0].update(method="speckv(draft='my/draft')", names=[]))
    assert kvfold.Cache.load(path, model, allow=["my/draft"]).method.draft == "my/draft"
    refused(model, path, r"allow='my/draft' must be a list of names", allow="my/draft")


# -- the file itself -----------------------------------------------------------------------------------------


def test_a_device_is_not_replaced(tmp_path):
    model, path = subject("llama"), tmp_path / "link"
    path.symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    for there in ("/dev/null", path, tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            kvfold.Cache(model).save(there)
        with pytest.raises(ValueError, match="not a regular file"):
            kvfold.Cache.load(there, model)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_the_mode_is_the_umasks(tmp_path):
    before = os.umask(0o027)
    try:
        kvfold.Cache(subject("llama")).save(tmp_path / "c")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o640


def test_the_columns_of_a_method_are_known_when_its_rows_join_others(tmp_path):
    """A file says which columns a method has set: among other methods' rows it sees no others."""
    model = subject("llama")
    cache = kvfold.Cache(model, "h2o", budget=0.5)
    greedy(model, cache, *tokens(40, 30).values(), 3)
    cache.save(tmp_path / "c")
    names = cache.rows.groups[0].names
    assert not names  # alone it sees all
    names = frozenset(parts(tmp_path / "c")[0]["groups"][0]["names"])
    assert names and kvfold.Cache.load(tmp_path / "c", model).rows.groups[0].names == names
