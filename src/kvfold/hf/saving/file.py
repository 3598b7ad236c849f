"""Saving a cache and reading it back, bit for bit: one safetensors file, tensors plus a JSON header."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvfold.formats import Chunk, Dense, Depth, DepthSegment
from kvfold.hf.call.rewriting import Reading
from kvfold.hf.layers import PagedLayer, WindowLayer
from kvfold.hf.saving.depth import load_depth, own_planes, save_depth
from kvfold.hf.saving.fingerprint import fields_of, fingerprint, modules_of
from kvfold.layer.layer import KVLayer

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache

VERSION = "2"
READING = ("valid", "places", "given")
"""Tensors of a `Reading`."""


def _device(model: PreTrainedModel, index: int) -> torch.device:
    """Where layer `index` of the model lies: a model may be spread over several devices."""
    weights = (weight for module in modules_of(model, index) for weight in module.parameters())
    return next((weight.device for weight in weights if not weight.is_meta), model.device)


def save(cache: "Cache", path: str | os.PathLike[str]) -> None:
    """Write what the cache holds to `path`, under a temporary name first. ValueError for layers it can't write."""
    cache.settle_pending()  # a decision that waits for assisted decoding's crop would be lost
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    written: dict[str, DepthSegment] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer):
            layers.append(_save_paged(layer.core, f"{index}", tensors, written))
        elif isinstance(layer, DynamicSlidingWindowLayer):
            if layer.is_initialized:
                tensors[f"{index}.keys"] = layer.keys.contiguous()
                tensors[f"{index}.values"] = layer.values.contiguous()
                if isinstance(layer, WindowLayer) and layer.places is not None:
                    tensors[f"{index}.places"] = layer.places.contiguous()
            layers.append({"kind": "window", "length": layer.cumulative_length})
        else:
            raise ValueError(f"layer {index} is a {type(layer).__name__}; only paged and window layers can be saved")
    reading = cache.reading
    if reading is not None:
        tensors |= {f"reading.{name}": getattr(reading, name).contiguous() for name in READING}
    header = {
        "version": VERSION,
        "method": str(cache.method),
        "prefill_chunk": cache.prefill_chunk,
        "model": type(cache.model).__name__,
        "fields": fields_of(cache.model),
        "fingerprint": fingerprint(cache.model, [core.layer for core in cache.paged]),
        "reading": None if reading is None else {"surplus": reading.surplus, "fixed": reading.fixed},
        "layers": layers,
    }
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, name, metadata={"kvfold": json.dumps(header)})
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _save_paged(
    core: KVLayer, prefix: str, tensors: dict[str, Tensor], written: dict[str, DepthSegment]
) -> dict[str, Any]:
    formats = []
    for number, (form, segment) in enumerate(core.segments):
        if isinstance(form, Depth) and isinstance(segment, DepthSegment):
            formats.append(save_depth(form, segment, f"{prefix}.{number}", tensors, written))
            continue
        if not isinstance(form, Dense):
            raise ValueError(f"layer {core.layer} holds a segment of format {form!r}, which can't be saved")
        segment.keep(
            segment.dense().valid, {}
        )  # no gaps, so that this cache goes on in the same order as the loaded one
        tokens = segment.dense()
        stored = {"keys": tokens.keys, "values": tokens.values, **tokens.columns}
        for name, plane in stored.items():
            flat = plane[tokens.valid].contiguous()
            tensors[f"{prefix}.{number}.{name}"] = (
                flat.to(form.dtype) if name in ("keys", "values") and form.dtype else flat
            )
        counts = segment.counts()
        formats.append(
            {
                "dtype": str(form.dtype).removeprefix("torch.") if form.dtype else None,
                "page_size": form.page_size,
                "counts": counts.tolist(),
            }
        )
    return {
        "kind": "paged",
        "seen": core.seen.tolist(),
        "prompt": core.prompt.tolist(),
        "width": core.width,
        "shape": core.shape,
        "dtype": str(core.dtype).removeprefix("torch."),
        "formats": formats,
    }


def load(path: str | os.PathLike[str], model: PreTrainedModel) -> "Cache":
    """Read a cache that `save` wrote. Raises ValueError where file and model don't belong together."""
    from kvfold.hf.cache import Cache

    here = f"path={os.fspath(path)!r}"
    header, tensors = _read(path, here)
    try:
        cache = Cache(model, header["method"], prefill_chunk=header.get("prefill_chunk"))
    except ValueError as error:
        raise ValueError(f"{here} holds a cache that can't be made: {error}") from error
    _check_model(here, header, cache)
    for index, state in enumerate(header["layers"]):
        if state["kind"] == "paged":
            _check_layer(here, index, state, tensors)
    made: dict[str, DepthSegment] = {}
    for index, (layer, state) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        device = _device(model, index)
        if state["kind"] == "paged":
            _load_paged(layer.core, f"{index}", state, tensors, device, made)
            layer.is_initialized = layer.core.width > 0
        elif f"{index}.keys" in tensors:
            keys, values = (tensors[f"{index}.{name}"].to(device) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, state["length"]
            if f"{index}.places" in tensors:
                layer.places = tensors[f"{index}.places"].to(device)
    if header.get("reading") is not None:
        where = cache.paged[0].device
        valid, places, given = (tensors[f"reading.{name}"].to(where) for name in READING)
        cache.reading = Reading(valid, places, given, **header["reading"])
    return cache


def _read(path: str | os.PathLike[str], here: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file; ValueError if it is cut off or of another kind."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            text = (file.metadata() or {}).get("kvfold")
            header = {} if text is None else json.loads(text)
            if not isinstance(header, dict) or "version" not in header:
                raise ValueError(f"{here} is not a kvfold cache")
            if header["version"] != VERSION:
                raise ValueError(f"{here} has version {header['version']}; this kvfold reads {VERSION}")
            names = file.keys()  # safe_open is no mapping
            return header, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{here} is not a kvfold cache, or only a part of one: {error}") from error


def _check_model(here: str, header: dict[str, Any], cache: "Cache") -> None:
    """ValueError unless the file was written for this model; it says what differs."""
    model = cache.model
    kinds = ["paged" if isinstance(layer, PagedLayer) else "window" for layer in cache.layers]
    if header["model"] != type(model).__name__ or kinds != [layer["kind"] for layer in header["layers"]]:
        raise ValueError(
            f"{here} holds a cache of a {header['model']} with {len(header['layers'])} layers; "
            f"model is a {type(model).__name__} with {len(kinds)}"
        )
    theirs, ours = header["fields"], fields_of(model)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"{here} holds a cache of a model with {name}={theirs.get(name)!r}; "
                f"this {type(model).__name__} has {name}={ours.get(name)!r}"
            )
    if header["fingerprint"] != fingerprint(model, [core.layer for core in cache.paged]):
        raise ValueError(f"{here} holds a cache of a {type(model).__name__} with other weights than this one's")


def _check_layer(here: str, index: int, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """ValueError unless a paged layer's tensors are what its header says: heads, head sizes, dtype, tokens."""
    if state["shape"] is None:
        return
    heads, *sizes = state["shape"]
    for number, form in enumerate(state["formats"]):
        counts = np.array(form["counts"], dtype=np.int64).reshape(-1, heads)
        place, dtype = form.get("of") or f"{index}.{number}", form["dtype"] or state["dtype"]
        total = int(counts.sum())
        planes = {name: ((total, size), dtype) for name, size in zip(("keys", "values"), sizes, strict=True)}
        for name, wanted in {**planes, **own_planes(form, total)}.items():
            plane = tensors.get(f"{place}.{name}")
            found = None if plane is None else (tuple(plane.shape), str(plane.dtype).removeprefix("torch."))
            if found != wanted or len(counts) != len(state["seen"]):
                raise ValueError(f"{here} is damaged: layer {index} has {name} {found} where its header says {wanted}")


def _load_paged(
    core: KVLayer, prefix: str, state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device,
    made: dict[str, DepthSegment],
) -> None:  # fmt: skip
    core.seen, core.prompt = (
        np.array(state["seen"], dtype=np.int64),
        np.array(state["prompt"], dtype=np.int64),
    )
    core.width, core.device = state["width"], device
    core.dtype = getattr(torch, state["dtype"])
    for number, form in enumerate(state["formats"]):
        if "side" in form:
            sizes, dtype = state["shape"], core.dtype
            core.segments.append(load_depth(form, f"{prefix}.{number}", tensors, sizes, dtype, device, made))
            continue
        counts = torch.tensor(form["counts"])
        valid = torch.arange(int(counts.max()) if counts.numel() else 0) < counts[..., None]
        planes = {name.split(".", 2)[2]: t for name, t in tensors.items() if name.startswith(f"{prefix}.{number}.")}
        dense = {}
        for name, flat in planes.items():
            dtype = core.dtype if name in ("keys", "values") else flat.dtype
            dense[name] = torch.zeros(*valid.shape, *flat.shape[1:], dtype=dtype)
            dense[name][valid] = flat.to(dtype)
            dense[name] = dense[name].to(device)
        columns = {name: plane for name, plane in dense.items() if name not in ("keys", "values")}
        tokens = Chunk(dense["keys"], dense["values"], valid.to(device), columns)
        dense_form = Dense(getattr(torch, form["dtype"]) if form["dtype"] else None, form["page_size"])
        core.shape = (valid.shape[1], tokens.keys.shape[3], tokens.values.shape[3])
        core.segments.append((dense_form, dense_form.segment(tokens)))
        core.segments[-1][1].append(tokens, even=bool(valid.all()))
