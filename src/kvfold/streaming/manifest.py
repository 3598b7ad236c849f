"""What lies in a context's folder: its text as ids, and for each part the files by level, with sizes and digests."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvfold.files import JSON_LIMIT, check_format, parse_json
from kvfold.options import LARGEST, shown
from kvfold.streaming.sources import Origin, check_digest

NAME, VERSION = "context.json", 1
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names of files: nothing that leads out of a folder."""
DIGEST = re.compile(r"[0-9a-f]{64}")
LARGEST_FILE = 1 << 32
"""Bytes of the largest file of a part."""


@dataclass(frozen=True)
class Blob:
    """A file of a part at one level."""

    file: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ContextPart:
    """The tokens [start, end) of the context, and their files by level."""

    start: int
    end: int
    levels: Mapping[int, Blob]


@dataclass(frozen=True)
class Manifest:
    """A context: its token ids, and its parts in order."""

    ids: tuple[int, ...]
    parts: tuple[ContextPart, ...]

    def as_json(self) -> dict[str, Any]:
        """As `read` takes it."""
        parts = [
            {"start": p.start, "end": p.end, "levels": {str(level): vars(blob) for level, blob in p.levels.items()}}
            for p in self.parts
        ]
        return {"format": VERSION, "ids": list(self.ids), "parts": parts}


def read(source: Origin, sha256: str | None = None) -> Manifest:
    """The manifest of a source. Raises ValueError for anything that none of ours says, or another digest than asked."""
    content = source.read(NAME, JSON_LIMIT)
    if sha256 is not None:
        check_digest(content, sha256, NAME)
    said = parse_json(content, NAME)
    if not isinstance(said, dict):
        raise ValueError(f"{NAME} has {shown(said)} where an object must be")
    check_format(said.get("format"), VERSION, NAME)
    ids, parts, at = said.get("ids"), list[ContextPart](), 0
    if not isinstance(ids, list) or not ids or not all(type(each) is int and 0 <= each <= LARGEST for each in ids):
        raise ValueError(f"{NAME} has ids={shown(ids)}, which must be ids of tokens")
    if not isinstance(said.get("parts"), list):
        raise ValueError(f"{NAME} has parts={shown(said.get('parts'))}, which must be a list")
    for each in said["parts"]:
        part = _part(each)
        if not at == part.start < part.end <= len(ids):
            raise ValueError(f"{NAME} has a part {part.start} to {part.end}, which must go on from {at} in {len(ids)}")
        parts.append(part)
        at = part.end
    if at != len(ids):
        raise ValueError(f"{NAME} has parts of {at} tokens, which must be all {len(ids)}")
    return Manifest(tuple(ids), tuple(parts))


def _part(said: object) -> ContextPart:
    if not isinstance(said, dict) or not isinstance(said.get("levels"), dict):
        raise ValueError(f"{NAME} has a part {shown(said)}, which must have start, end and levels")
    levels = {}
    for level, blob in said["levels"].items():
        known = isinstance(blob, dict) and set(blob) == {"file", "nbytes", "sha256"} and re.fullmatch(r"[1-9]", level)
        if (
            not known
            or not (isinstance(blob["file"], str) and PLAIN.fullmatch(blob["file"]))
            or not (isinstance(blob["sha256"], str) and DIGEST.fullmatch(blob["sha256"]))
            or not (type(blob["nbytes"]) is int and 0 < blob["nbytes"] <= LARGEST_FILE)
        ):
            raise ValueError(f"{NAME} has level {shown(level)}={shown(blob)}, which must have file, nbytes and sha256")
        levels[int(level)] = Blob(**blob)
    for name in ("start", "end"):
        if type(said.get(name)) is not int:
            raise ValueError(f"{NAME} has a part with {name}={shown(said.get(name))}, which must be an int")
    return ContextPart(said["start"], said["end"], levels)
