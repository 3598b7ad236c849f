"""A safetensors file with a JSON header, and a digest of every byte of it: what is damaged anywhere is not read."""

import hashlib
import json
import os
from io import BufferedIOBase
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.files import check_format, check_regular, parse_json, replacing

VERSION = 3
"""Of the header. 1 and 2 had no digest."""
HEADER, SEAL = "kvfold", "sha256"
"""The names of header and digest in the file's metadata."""
BLANK = "0" * 64
"""What stands for the digest while it is worked out."""
HEADER_LIMIT = 32 << 20
"""Bytes of the largest header: parsed it takes some thirty times as much."""
FILE_HEADER_LIMIT = 100_000_000
"""Bytes that safetensors itself allows for names, shapes and metadata."""
LARGEST_SIZE = 2**40
"""More numbers than any tensor has along one axis."""
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
"""Of the tensors of a cache, as safetensors calls them."""


def write_sealed(path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write header and tensors, whole or not at all. Raises ValueError for a header that could not be read again."""
    text = json.dumps({"version": VERSION, **header})
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"path={os.fspath(path)!r}: a header of {len(text)} bytes is more than {HEADER_LIMIT}")
    with replacing(path) as part:
        save_file(tensors, part, metadata={HEADER: text, SEAL: BLANK})
        with part.open("rb+") as file:
            place, held, digest = _digest(file)
            assert held == BLANK, "a file that was just written has another digest"
            file.seek(place)
            file.write(digest.encode())


def read_sealed(path: str | os.PathLike[str], here: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file; `here` names it in errors.

    Raises ValueError for a file of another kind or format, for a part of one, and for one with a byte changed.
    """
    check_regular(path)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            with open(path, "rb") as content:
                place, held, digest = _digest(content)
            if place and held != digest:
                raise ValueError(f"{here} is damaged: its SHA-256 is another than when it was written")
            header = _header((file.metadata() or {}).get(HEADER), here)
            version = header["version"]
            check_format(int(version) if version in ("1", "2") else version, VERSION, here)  # those had it as text
            if not place:
                raise ValueError(f"{here} is damaged: its SHA-256 is not there")
            names = file.keys()  # safe_open is no mapping
            for name in names:
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES or any(size > LARGEST_SIZE for size in part.get_shape()):
                    raise ValueError(f"{here} is damaged: {name!r} is {part.get_dtype()} of {part.get_shape()}")
            return header, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{here} is not a kvfold cache, or only a part of one: {error}") from error


def _header(text: str | None, here: str) -> dict[str, Any]:
    """What a file's header says. Raises ValueError for one that is none of ours."""
    if text is not None and len(text) > HEADER_LIMIT:
        raise ValueError(f"{here} has a header of {len(text)} bytes, of which at most {HEADER_LIMIT} are read")
    header = None if text is None else parse_json(text, f"{here} is not a kvfold cache: its header")
    if not isinstance(header, dict) or "version" not in header:
        raise ValueError(f"{here} is not a kvfold cache")
    return header


def _digest(file: BufferedIOBase) -> tuple[int, str, str]:
    """Where a file's digest stands, the digest there, and what it should be; place 0 where none is."""
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), FILE_HEADER_LIMIT))
    # Only as a name of the metadata: within the text of a header every quote has a backslash before it.
    before, found, behind = head.partition(f'"{SEAL}":"'.encode())
    place = len(before) + len(found) if found else 0
    held = behind[: len(BLANK)]
    seen = hashlib.sha256(before + found + BLANK.encode() + behind[len(BLANK) :] if found else head)
    return place, held.decode("latin-1"), hashlib.file_digest(file, lambda: seen).hexdigest()
