"""The text form of a codec, `cachegen(level=2)`, and its form in a file's header."""

import ast
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from kvfold.codecs.cachegen import CacheGen
from kvfold.options import shown

CODECS: dict[str, type[CacheGen]] = {"cachegen": CacheGen}
"""All codecs, by the names that texts and files have for them."""


def parse_codec(codec: str | CacheGen) -> CacheGen:
    """A codec from itself or its text. Raises ValueError that names what is unknown."""
    if isinstance(codec, CacheGen):
        return codec
    try:
        call = ast.parse(codec, mode="eval").body
        name = call.func if isinstance(call, ast.Call) else call
        slug = name.id if isinstance(name, ast.Name) else None
        given = call.keywords if isinstance(call, ast.Call) else []
        options = {option.arg: ast.literal_eval(option.value) for option in given}
        if isinstance(call, ast.Call) and call.args:
            slug = None
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # the third: no text
        slug, options = None, {}
    if slug is None:
        raise ValueError(f"codec={shown(codec)} must be a text such as 'cachegen(level=2)', or a CacheGen")
    return codec_from({"codec": slug, "options": options}, whole=False)


def codec_to(codec: CacheGen) -> dict[str, Any]:
    """A codec as JSON."""
    return {"codec": next(name for name, kind in CODECS.items() if type(codec) is kind), "options": asdict(codec)}


def codec_from(said: Mapping[str, Any], *, whole: bool = True) -> CacheGen:
    """The codec of a header's entry, with all of its options (`whole`). Raises ValueError for what is unknown."""
    name, options = said.get("codec"), said.get("options")
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"codec={shown(name)} must be one of {', '.join(CODECS)}")
    allowed = [option.name for option in fields(CODECS[name])]
    known = isinstance(options, Mapping) and (set(options) == set(allowed) if whole else set(options) <= set(allowed))
    if not isinstance(options, Mapping) or not known:
        raise ValueError(f"options={shown(options)} of {name} must be {', '.join(allowed)}")
    return CODECS[name](**options)
