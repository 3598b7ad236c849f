"""What files know formats by: a name, and the options of its dataclass."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from kvfold.formats.balanced import Balanced
from kvfold.formats.dense import Dense
from kvfold.formats.depth import Depth
from kvfold.formats.elite import Elite
from kvfold.formats.fp8 import Fp8
from kvfold.formats.indexed import Indexed
from kvfold.formats.kivi import Kivi
from kvfold.formats.rotated import Rotated
from kvfold.formats.segment import Format
from kvfold.formats.separable import Separable
from kvfold.formats.shadowed import Shadowed
from kvfold.formats.sparse import Sparse
from kvfold.formats.summed import Summed
from kvfold.formats.thin import Thin
from kvfold.formats.uneven import Uneven
from kvfold.options import shown

KINDS: dict[str, type[Any]] = {
    "balanced": Balanced, "dense": Dense, "depth": Depth, "elite": Elite, "fp8": Fp8,
    "indexed": Indexed, "kivi": Kivi,
    "rotated": Rotated, "separable": Separable, "shadowed": Shadowed, "sparse": Sparse, "summed": Summed,
    "thin": Thin, "uneven": Uneven,
}  # fmt: skip
"""All formats, and what they are made of, by the names that files have for them."""
DEEPEST = 4
"""Formats and parts that stand in each other."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What models compute in."""


def register(name: str, cls: type[Any]) -> None:
    """Let files know a format, or a part of one, that is made in another room."""
    KINDS[name] = cls


def format_to(form: Any) -> dict[str, Any]:
    """A format as JSON, and so the parts that it is made of. Raises ValueError for one that has no name here."""
    kind = next((name for name, cls in KINDS.items() if type(form) is cls), None)
    if kind is None:
        raise ValueError(f"format={form!r} can't be saved: files know {', '.join(KINDS)}")
    return {"format": kind, "options": {option.name: _said(getattr(form, option.name)) for option in fields(form)}}


def _said(value: Any) -> Any:
    if is_dataclass(value):
        return format_to(value)
    return _name(value) if isinstance(value, torch.dtype) else value


def format_from(said: Mapping[str, Any]) -> Format:
    """The format of a header's entry. Raises ValueError that names what is unknown."""
    made = _part_from(said)
    if not isinstance(made, Format):
        raise ValueError(f"format={shown(said.get('format'))} is a part of one, and none by itself")
    return made


def _part_from(said: Mapping[str, Any], depth: int = 0) -> Any:
    kind, options = said.get("format"), said.get("options")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"format={shown(kind)} is not one of {', '.join(KINDS)}")
    allowed = [option.name for option in fields(KINDS[kind])]
    if not isinstance(options, Mapping) or set(options) != set(allowed):
        raise ValueError(f"options={shown(options)} of {kind} must be {', '.join(allowed)}")
    if depth > DEEPEST:
        raise ValueError(f"format={shown(kind)} stands in more than {DEEPEST} others")
    named = dict(options)
    for option in fields(KINDS[kind]):
        value = named[option.name]
        if option.type in (int, bool) and type(value) is not option.type:
            raise ValueError(f"{option.name}={shown(value)} of {kind} must be {option.type.__name__}")
        if isinstance(value, Mapping):
            named[option.name] = _part_from(value, depth + 1)
        elif isinstance(value, list):
            named[option.name] = tuple(value)  # JSON has no others, and options must be hashable
    if named.get("dtype") is not None:
        named["dtype"] = dtype_from(named["dtype"])
    return KINDS[kind](**named)


def dtype_from(name: object) -> torch.dtype:
    """What a header calls a dtype that models compute in. Raises ValueError for other names."""
    found = next((dtype for dtype in DTYPES if _name(dtype) == name), None)
    if found is None:
        raise ValueError(f"dtype={shown(name)} must be one of {', '.join(map(_name, DTYPES))}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
