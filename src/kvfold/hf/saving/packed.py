"""A cache file's planes in a codec: what is written, and the plain planes again, checked before they are there."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.codecs import CacheGen, codec_from, codec_to
from kvfold.codecs.planes import PlaneCoding
from kvfold.formats import POSITION, dtype_from
from kvfold.hf.saving.said import Entry
from kvfold.options import LARGEST

CODEC = "codec"
"""The header's entry: the codec and, of each plane that is coded, what its code needs to be read."""
WHAT = ("keys", "values")


def pack(
    codec: CacheGen, header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors with keys and values in code: of dense pages and of sliding windows.

    Other formats' codes, recurrent states, positions and all columns stay as they are, and so does a plane that its
    code would not make smaller.
    """
    found, planes = dict(tensors), dict[str, Any]()
    for name, layer, counts, raw in planes_of(codec, header, tensors):
        plane = found[name]
        bins = codec.bins(name.rsplit(".", 1)[-1], layer, len(header["layers"]))
        made = codec.encode(plane.reshape(-1, plane.shape[-1]), counts, raw, bins)
        if made is not None:
            coding, parts = made
            del found[name]
            found |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            planes[name] = {
                "shape": list(plane.shape), "dtype": str(plane.dtype).removeprefix("torch."),
                "rows": len(counts), "counts": counts.reshape(-1).tolist(), "bins": bins,
                "joint": coding.joint, "group": coding.group,
            }  # fmt: skip
    return {**header, CODEC: {**codec_to(codec), "planes": planes}}, found


def planes_of(
    codec: CacheGen, header: dict[str, Any], tensors: dict[str, Tensor]
) -> Iterator[tuple[str, int, np.ndarray, Tensor]]:
    """The planes to code: name, layer, tokens of each row and head, and which of them are the first of their text."""
    seen = torch.tensor(header["rows"]["seen"], dtype=torch.int64)
    for layer, said in enumerate(header["layers"]):
        if said["kind"] == "window" and "held" not in said and f"{layer}.keys" in tensors:
            b, h, t, _ = tensors[f"{layer}.keys"].shape
            counts = np.full((b, h), t)
            place = torch.arange(t) + seen[:, None] - t  # rows end at the same column
            raw = ((place >= 0) & (place < codec.first))[:, None].expand(b, h, t).reshape(-1)
            yield from ((f"{layer}.{what}", layer, counts, raw) for what in WHAT)
        for number, form in enumerate(said.get("formats", ())):
            name = f"{layer}.{number}"
            if form["format"] == "dense" and f"{name}.keys" in tensors:
                raw = tensors[f"{name}.{POSITION}"].cpu() < codec.first
                yield from ((f"{name}.{what}", layer, np.array(form["counts"]), raw) for what in WHAT)


def unpack(header: Entry, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every plane as it was before `pack`, or what the codec makes of it.

    Raises ValueError where the header's entry and the tensors are not what `pack` writes.
    """
    if header.null(CODEC):
        return tensors
    entry = header.part(CODEC)
    codec_from(entry.said)
    found = dict(tensors)
    for name in entry.part("planes").said:
        plane = Entry(f"plane {name!r}", entry.part("planes").said[name])
        coding, shape = _coding(plane)
        own = [part for part in tensors if part.startswith(f"{name}.")]
        parts = {part.removeprefix(f"{name}."): found.pop(part) for part in own if part in found}
        if name in found:
            raise ValueError(f"{plane.where} is there, and its code")
        try:
            found[name] = coding.decode(parts).view(shape)
        except ValueError as error:
            raise ValueError(f"{plane.where} has {error}") from None
    return found


def _coding(plane: Entry) -> tuple[PlaneCoding, list[int]]:
    """How a plane is coded, and its shape. Raises ValueError where that can't be."""
    shape, rows = plane.integers("shape").tolist(), plane.integer("rows", low=1)
    counts = plane.integers("counts")
    if len(shape) < 2 or shape[-1] == 0 or not len(counts) or len(counts) % rows:
        raise plane.fail("shape", f"that of {len(counts)} heads of {rows} rows")
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    if tokens != int(counts.sum()):
        raise plane.fail("shape", f"that of {int(counts.sum())} tokens")
    bins = plane.integer("bins", low=4, high=256)
    try:
        dtype = dtype_from(plane.said.get("dtype"))
    except ValueError as error:
        raise ValueError(f"{plane.where} has {error}") from None
    per_head = counts.reshape(rows, -1)
    group = plane.integer("group", high=LARGEST)
    return PlaneCoding(per_head, shape[-1], dtype, bins, plane.flag("joint"), group), shape
