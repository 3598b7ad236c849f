"""Saving a cache and reading it back, bit for bit: one safetensors file, tensors plus a JSON header."""

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.files import write_whole
from kvfold.formats import Segment, Spec, format_from, format_to
from kvfold.hf.beside import is_window, restore, state_of
from kvfold.hf.call.host import Host
from kvfold.hf.call.reading import Reading
from kvfold.hf.layers import PagedLayer
from kvfold.hf.saving.fingerprint import fields_of, fingerprint, modules_of
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Group
from kvfold.layer.stored import Stored

VERSION = "2"
READING = ("valid", "places", "given")
"""Tensors of a `Reading`."""


def _device(model: PreTrainedModel, index: int) -> torch.device:
    """Where layer `index` of the model lies: a model may be spread over several devices."""
    weights = (weight for module in modules_of(model, index) for weight in module.parameters())
    return next((weight.device for weight in weights if not weight.is_meta), model.device)


def save(cache: Host, path: str | os.PathLike[str]) -> None:
    """Write what the cache holds to `path`, under a temporary name first. ValueError for layers it can't write."""
    cache.settle_pending()  # a decision that waits for assisted decoding's crop would be lost
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    written: dict[str, Segment] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PagedLayer):
            layers.append(_save_paged(layer.core, f"{index}", tensors, written))
        else:
            said, own = state_of(layer)
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in own.items()}
            layers.append(said)
    reading, groups = cache.reading, cache.rows.groups
    if reading is not None:
        tensors |= {f"reading.{name}": getattr(reading, name).contiguous() for name in READING}
    header = {
        "version": VERSION,
        "method": str(groups[0].method),
        "groups": [_said_of(group) for group in groups] if len(groups) > 1 else None,
        "prefill_chunk": cache.prefill_chunk,
        "model": type(cache.model).__name__,
        "fields": fields_of(cache.model),
        "fingerprint": fingerprint(cache.model, [core.layer for core in cache.paged]),
        "reading": None if reading is None else {"surplus": reading.surplus, "fixed": reading.fixed},
        "layers": layers,
    }
    write_whole(path, lambda part: save_file(tensors, part, metadata={"kvfold": json.dumps(header)}))


def _said_of(group: Group) -> dict[str, Any]:
    assert group.rows is not None
    return {"method": str(group.method), "rows": group.rows.tolist(), "names": sorted(group.names)}


def _save_paged(core: KVLayer, prefix: str, tensors: dict[str, Tensor], written: dict[str, Segment]) -> dict[str, Any]:
    formats = []
    for number, (form, segment) in enumerate(core.segments):
        name = f"{prefix}.{number}"
        twin = next(
            (other for other, theirs in written.items() if segment.longest and segment.same_pages(theirs)), None
        )
        said, planes = segment.state(of=twin)
        tensors |= {f"{name}.{plane}": tensor.contiguous() for plane, tensor in planes.items()}
        written[name] = segment
        formats.append({**format_to(form), **said, "of": twin})
    return {
        "kind": "paged",
        "seen": core.seen.tolist(),
        "prompt": core.prompt.tolist(),
        "width": core.width,
        "shape": core.shape,
        "dtype": str(core.stored.spec.dtype).removeprefix("torch."),
        "opened": core.stored.opened.tolist(),
        "ordered": core.stored.ordered,
        "formats": formats,
    }


def load(path: str | os.PathLike[str], make: Callable[[str, int | None], Host]) -> Any:
    """Read a cache that `save` wrote; `make` makes an empty one of a method's text and a chunk size.

    Raises ValueError where file and model don't belong together.
    """
    here = f"path={os.fspath(path)!r}"
    header, tensors = _read(path, here)
    try:
        cache = make(header["method"], header.get("prefill_chunk"))
        methods = [make(said["method"], None).method for said in header.get("groups") or ()]
    except ValueError as error:
        raise ValueError(f"{here} holds a cache that can't be made: {error}") from error
    _check_model(here, header, cache)
    stores: dict[int, Stored] = {}
    made: dict[str, Segment] = {}
    for index, (layer, state) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        if state["kind"] == "paged" and state["shape"] is not None:
            stores[index] = _stored(here, index, state, tensors, layer.core, _device(cache.model, index), made)
    for index, (layer, state) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        if state["kind"] == "paged":
            rows = layer.core.rows
            rows.seen, rows.prompt = (np.array(state[name], dtype=np.int64) for name in ("seen", "prompt"))
            rows.width = rows.width_before = state["width"]
            layer.core.stored = stores.get(index, layer.core.stored)
            layer.is_initialized = state["width"] > 0
        else:
            own = _under(f"{index}.", tensors)
            if own:
                restore(layer, state, own, _device(cache.model, index))
    if methods:
        cache.rows.groups = tuple(
            Group(method, np.array(said["rows"], dtype=np.int64), frozenset(said["names"]))
            for method, said in zip(methods, header["groups"], strict=True)
        )
    if header.get("reading") is not None:
        where = cache.paged[0].stored.spec.device
        valid, places, given = (tensors[f"reading.{name}"].to(where) for name in READING)
        cache.reading = Reading(valid, places, given, **header["reading"])
    return cache


def _opened(state: dict[str, Any]) -> np.ndarray:
    """Which segment takes each row's new tokens; the first, where nobody says."""
    return np.array(state.get("opened", [0] * len(state["seen"])), dtype=np.int64)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _stored(
    here: str, index: int, state: dict[str, Any], tensors: dict[str, Tensor], core: KVLayer, device: torch.device,
    made: dict[str, Segment],
) -> Stored:  # fmt: skip
    """What a paged layer's header and tensors say. ValueError unless they belong together: heads, sizes, tokens."""
    heads, keys, values = state["shape"]
    site, dtype = core.site, getattr(torch, state["dtype"])
    spec = Spec(
        len(state["seen"]), heads, keys, values, dtype, device, layer=site.layer, rope=site.rope, arena=core.arena
    )
    segments = []
    for number, said in enumerate(state["formats"]):
        name, form = f"{index}.{number}", format_from(said)
        own = _under(f"{name}.", tensors)
        twin = None if said.get("of") is None else made[said["of"]]
        try:
            made[name] = form.restore(spec, said, own, twin)
        except ValueError as error:
            raise ValueError(f"{here} is damaged: layer {index} has {error}") from error
        segments.append((form, made[name]))
    return Stored(spec, segments, _opened(state), state.get("ordered", True))


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


def _check_model(here: str, header: dict[str, Any], cache: Host) -> None:
    """ValueError unless the file was written for this model; it says what differs."""
    model = cache.model
    kinds = ["paged" if isinstance(x, PagedLayer) else "window" if is_window(x) else "state" for x in cache.layers]
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
