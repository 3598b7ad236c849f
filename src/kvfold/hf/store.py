"""Saving a cache and reading it back, bit for bit: one safetensors file, tensors plus a JSON header."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvfold.formats import Chunk, Dense
from kvfold.hf.layers import PagedLayer
from kvfold.layer import KVLayer

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache

VERSION = "1"


def save(cache: "Cache", path: str | os.PathLike[str]) -> None:
    """Write what the cache holds to `path`, under a temporary name first. ValueError for layers it can't write."""
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer):
            layers.append(_save_paged(layer.core, f"{index}", tensors))
        elif isinstance(layer, DynamicSlidingWindowLayer):
            if layer.is_initialized:
                tensors[f"{index}.keys"] = layer.keys.contiguous()
                tensors[f"{index}.values"] = layer.values.contiguous()
            layers.append({"kind": "window", "length": layer.cumulative_length})
        else:
            raise ValueError(f"layer {index} is a {type(layer).__name__}; only paged and window layers can be saved")
    header = {
        "version": VERSION,
        "method": str(cache.method),
        "model": type(cache.model).__name__,
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


def _save_paged(core: KVLayer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    formats = []
    for number, (form, segment) in enumerate(core.segments):
        if not isinstance(form, Dense):
            raise ValueError(f"layer {core.layer} holds a segment of format {form!r}; only dense ones can be saved")
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
        "dtype": str(core.dtype).removeprefix("torch."),
        "formats": formats,
    }


def load(path: str | os.PathLike[str], model: PreTrainedModel) -> "Cache":
    """Read a cache that `save` wrote. Raises ValueError where file and model don't belong together."""
    from kvfold.hf.cache import Cache

    with safe_open(os.fspath(path), framework="pt") as file:
        text = (file.metadata() or {}).get("kvfold")
        if text is None:
            raise ValueError(f"path={os.fspath(path)!r} is not a kvfold cache")
        header = json.loads(text)
        if header["version"] != VERSION:
            raise ValueError(f"path={os.fspath(path)!r} has version {header['version']}; this kvfold reads {VERSION}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    cache = Cache(model, header["method"])
    kinds = ["paged" if isinstance(layer, PagedLayer) else "window" for layer in cache.layers]
    if header["model"] != type(model).__name__ or kinds != [layer["kind"] for layer in header["layers"]]:
        raise ValueError(
            f"path={os.fspath(path)!r} holds a cache of a {header['model']} with {len(header['layers'])} layers; "
            f"model is a {type(model).__name__} with {len(kinds)}"
        )
    for index, (layer, state) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        if state["kind"] == "paged":
            _load_paged(layer.core, f"{index}", state, tensors, model.device)
        elif f"{index}.keys" in tensors:
            keys, values = (tensors[f"{index}.{name}"].to(model.device) for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, state["length"]
    return cache


def _load_paged(
    core: KVLayer, prefix: str, state: dict[str, Any], tensors: dict[str, Tensor], device: torch.device
) -> None:
    core.seen, core.prompt = (
        np.array(state["seen"], dtype=np.int64),
        np.array(state["prompt"], dtype=np.int64),
    )
    core.width, core.device = state["width"], device
    core.dtype = getattr(torch, state["dtype"])
    for number, form in enumerate(state["formats"]):
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
        made = Dense(getattr(torch, form["dtype"]) if form["dtype"] else None, form["page_size"])
        core.shape = (valid.shape[1], tokens.keys.shape[3], tokens.values.shape[3])
        core.segments.append((made, made.segment(tokens)))
        core.segments[-1][1].append(tokens, even=bool(valid.all()))
