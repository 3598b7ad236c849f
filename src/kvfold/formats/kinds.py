"""What files know formats by: a name, and the options of its dataclass."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from kvfold.formats.dense import Dense
from kvfold.formats.depth import Depth
from kvfold.formats.fp8 import Fp8
from kvfold.formats.int4 import Int4
from kvfold.formats.segment import Format

KINDS: dict[str, type[Any]] = {"dense": Dense, "depth": Depth, "fp8": Fp8, "int4": Int4}
"""All formats, by the names that files have for them."""


def format_to(form: Format) -> dict[str, Any]:
    """A format as JSON. Raises ValueError for one that has no name here."""
    kind = next((name for name, cls in KINDS.items() if type(form) is cls), None)
    if kind is None:
        raise ValueError(f"format={form!r} can't be saved: files know {', '.join(KINDS)}")
    options = asdict(form)  # type: ignore[call-overload]
    named = {name: _name(value) if isinstance(value, torch.dtype) else value for name, value in options.items()}
    return {"format": kind, "options": named}


def format_from(said: Mapping[str, Any]) -> Format:
    """The format of a header's entry. Raises ValueError that names what is unknown."""
    if "format" not in said:  # as files had it when there were two, that differ by `side`
        kind = "depth" if "side" in said else "dense"
        options = {name: said[name] for name in ("side", "dtype", "page_size") if name in said}
        options.pop("dtype" if kind == "depth" else "side", None)
    else:
        kind, options = said["format"], dict(said["options"])
    if kind not in KINDS:
        raise ValueError(f"format={kind!r} is not one of {', '.join(KINDS)}")
    if isinstance(options.get("dtype"), str):
        options["dtype"] = getattr(torch, options["dtype"])
    made: Format = KINDS[kind](**options)
    return made


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
