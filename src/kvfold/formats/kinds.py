"""What files know formats by: a name, and the options of its dataclass."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch

from kvfold.formats.balanced import Balanced
from kvfold.formats.dense import Dense
from kvfold.formats.depth import Depth
from kvfold.formats.elite import Elite
from kvfold.formats.fp8 import Fp8
from kvfold.formats.kivi import Kivi
from kvfold.formats.rotated import Rotated
from kvfold.formats.segment import Format
from kvfold.formats.separable import Separable
from kvfold.formats.sparse import Sparse
from kvfold.formats.summed import Summed
from kvfold.formats.thin import Thin
from kvfold.formats.uneven import Uneven
from kvfold.options import shown

KINDS: dict[str, type[Any]] = {
    "balanced": Balanced, "dense": Dense, "depth": Depth, "elite": Elite, "fp8": Fp8, "kivi": Kivi,
    "rotated": Rotated, "separable": Separable, "sparse": Sparse, "summed": Summed, "thin": Thin, "uneven": Uneven,
}  # fmt: skip
"""All formats, by the names that files have for them."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""What models compute in."""


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
    kind, options = said.get("format"), said.get("options")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"format={shown(kind)} is not one of {', '.join(KINDS)}")
    allowed = [option.name for option in fields(KINDS[kind])]
    if not isinstance(options, Mapping) or set(options) != set(allowed):
        raise ValueError(f"options={shown(options)} of {kind} must be {', '.join(allowed)}")
    named = dict(options)
    for option in fields(KINDS[kind]):
        value = named[option.name]
        if option.type in (int, bool) and type(value) is not option.type:
            raise ValueError(f"{option.name}={shown(value)} of {kind} must be {option.type.__name__}")
    if named.get("dtype") is not None:
        named["dtype"] = dtype_from(named["dtype"])
    made: Format = KINDS[kind](**named)
    return made


def dtype_from(name: object) -> torch.dtype:
    """What a header calls a dtype that models compute in. Raises ValueError for other names."""
    found = next((dtype for dtype in DTYPES if _name(dtype) == name), None)
    if found is None:
        raise ValueError(f"dtype={shown(name)} must be one of {', '.join(map(_name, DTYPES))}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
