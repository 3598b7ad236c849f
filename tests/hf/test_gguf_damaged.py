"""GGUF files that are cut, damaged or say of themselves what can't be: refused by name, and at once."""

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import kvfold
from gguf_files import write_llama
from kvfold.models.gguf import header


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_llama(path)
    return path.read_bytes()


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def made(*entries: bytes, keys: int | None = None, tensors: int = 0, rest: bytes = b"") -> bytes:
    """A file whose metadata are these entries, or say that they are `keys`."""
    count = len(entries) if keys is None else keys
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + b"".join(entries) + rest


STRING, ARRAY, INT8 = 8, 9, 1
CLAIMS = {
    "a string of all memory": made(struct.pack("<Q", 2**63 - 1) + b"x"),
    "a string of 2**64 bytes": made(struct.pack("<Q", 2**64 - 1) + b"x"),
    "a string of 200 MB": made(struct.pack("<Q", 200 * 2**20) + b"x"),
    "keys without end": made(keys=2**63),
    "tensors without end": made(tensors=2**63),
    "an array of all numbers": made(text(b"k") + struct.pack("<IIQ", ARRAY, INT8, 2**63)),
    "an array behind the end": made(text(b"k") + struct.pack("<IIQ", ARRAY, INT8, 10**6)),
    "an array of strings without end": made(text(b"k") + struct.pack("<IIQ", ARRAY, STRING, 2**60)),
    "arrays in arrays": made(text(b"k") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 100_000),
    "a value of no type": made(text(b"k") + struct.pack("<I", 77)),
    "a tensor of all axes": made(tensors=1, rest=text(b"t") + struct.pack("<I", 2**32 - 1)),
    "no architecture": made(),
    "an architecture that is a number": made(text(b"general.architecture") + struct.pack("<Ib", INT8, 5)),
    "an architecture that nobody has": made(text(b"general.architecture") + struct.pack("<I", STRING) + text(b"none")),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_can_not_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "odd.gguf"
    path.write_bytes(CLAIMS[name])
    with pytest.raises(ValueError, match=r"odd\.gguf"):
        kvfold.load(path, progress=False)
    left = [each for each in (tmp_path / "cache").rglob("*") if each.is_file() and each.suffix != ".lock"]
    assert not left


@given(
    changes=st.lists(st.tuples(st.integers(0, 2**15), st.integers(0, 255)), max_size=5), end=st.integers(0, 2**15),
)  # fmt: skip
@example(changes=[], end=3)
@example(changes=[(0, 0)], end=2**15)
def test_a_header_reads_or_is_refused(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(whole[:end])
    for at, value in changes:
        if content:
            content[at % len(content)] = value
    path = tmp_path_factory.mktemp("gguf") / "odd.gguf"
    path.write_bytes(content)
    try:
        found = header(path)
    except ValueError as error:
        assert "odd.gguf" in str(error)
    else:
        assert isinstance(found["tensors"], list)


KEYS = ["llama.block_count", "llama.embedding_length", "llama.attention.head_count", "tokenizer.ggml.model",
        "tokenizer.ggml.tokens", "general.architecture", "llama.context_length", "token_embd.weight",
        "llama.attention.head_count_kv", "llama.rope.dimension_count"]  # fmt: skip


@pytest.mark.slow
@given(key=st.sampled_from(KEYS), offset=st.integers(0, 11), value=st.sampled_from([0, 1, 7, 255]))
def test_a_file_loads_or_is_refused(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, key: str, offset: int, value: int
) -> None:
    """What transformers' and gguf's readers raise of such files comes out as one of ours."""
    folder = tmp_path_factory.mktemp("gguf")
    content = bytearray(whole)
    content[content.index(key.encode()) + len(key) + offset] = value
    (folder / "odd.gguf").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVFOLD_CACHE", str(folder / "cache"))
        try:
            kvfold.load(folder / "odd.gguf", progress=False)
        except (ValueError, OSError) as error:
            assert "odd.gguf" in str(error)
