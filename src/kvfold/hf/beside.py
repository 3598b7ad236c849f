"""Layers that are not on pages, windows and recurrent states: how rows join them, leave, are saved and counted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvfold.hf.layers import WindowLayer, beside_bytes
from kvfold.hf.saving.said import Entry
from kvfold.hf.saving.window import check_window, window_state
from kvfold.hf.windows import CodedWindow
from kvfold.options import LARGEST

STATES = ("conv_states", "recurrent_states")
FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")
"""What transformers' layers with states hold by number: tensors, and what they remember of them."""


def is_empty(layer: Any) -> bool:
    """Whether a layer has read nothing."""
    return not getattr(layer, "is_initialized", False) and not any(
        state is not None for name in STATES for state in getattr(layer, name, {}).values()
    )


def end_recording(layer: Any) -> None:
    """Nobody crops any more: windows and states hold from now on what the next pass reads, and no past."""
    if not getattr(layer, "record_past", False):
        return
    if isinstance(layer, CodedWindow):
        layer.end_recording()
        return
    if is_window(layer) and layer.is_initialized:
        behind = max(0, layer.keys.shape[2] - layer.sliding_window + 1)
        layer.keys, layer.values = layer.keys[:, :, behind:].clone(), layer.values[:, :, behind:].clone()
    for number, state in getattr(layer, "conv_states", {}).items():
        if state is not None:  # a text shorter than the kernel was not padded while its past was recorded
            size = layer.conv_kernel_size[number]
            layer.conv_states[number] = F.pad(state, (max(0, size - state.shape[-1]), 0))[..., -size:].contiguous()
    layer.record_past = False


def leave_inference(layer: Any) -> None:
    """What was made under torch.inference_mode() is copied, so that a pass outside it may write there."""
    for name in ("keys", "values"):
        held = getattr(layer, name, None)
        if isinstance(held, Tensor) and held.is_inference():
            setattr(layer, name, held.clone())
    for name in STATES:
        states = getattr(layer, name, {})
        for number, state in states.items():
            if state is not None and state.is_inference():
                states[number] = state.clone()


def check_join(mine: Any, theirs: Any) -> None:
    """Raise ValueError where the rows of two layers can't lie side by side."""
    forms = [layer.form if isinstance(layer, CodedWindow) else None for layer in (mine, theirs)]
    if forms[0] != forms[1]:
        raise ValueError(f"the other cache's windows lie in {forms[1]}, which must be {forms[0]}, as this one's do")
    for layer in (mine, theirs):
        if isinstance(layer, WindowLayer) and layer.places is not None:
            raise ValueError("a cache whose method narrowed a window's text can't join another one")
        if getattr(layer, "record_past", False):
            raise ValueError("a cache of assisted decoding can't join another one, nor be joined")


def join_layers(mine: Any, theirs: Any) -> None:
    """Take the rows of `theirs` behind ours. Windows end at the same column, shorter ones have padding in front."""
    if isinstance(mine, CodedWindow):
        mine.join(theirs)
        return
    if isinstance(getattr(mine, "keys", None), Tensor):
        most = max(mine.keys.shape[2], theirs.keys.shape[2])
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (mine, theirs)]
            setattr(mine, name, torch.cat([F.pad(x, (0, 0, most - x.shape[2], 0)) for x in parts]))
    if hasattr(mine, "cumulative_length"):
        mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)
    for name in STATES:
        held = getattr(mine, name, {})
        for number, state in held.items():
            if state is not None:
                held[number] = torch.cat([state, getattr(theirs, name)[number].to(state.device)])


def select_rows(layer: Any, rows: np.ndarray) -> None:
    """Row i becomes what row `rows[i]` was."""
    if not is_empty(layer):
        layer.reorder_cache(torch.from_numpy(rows))


def row_nbytes(layer: Any, batch: int) -> np.ndarray:
    """Bytes of each row, (B,): all have as much, but of windows in codes."""
    if isinstance(layer, CodedWindow):
        return layer.row_nbytes(batch)
    return np.full(batch, beside_bytes(layer) // max(1, batch), dtype=np.int64)


def state_of(layer: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a layer holds, as JSON and tensors."""
    if isinstance(layer, CodedWindow):
        return window_state(layer)
    tensors = {name: getattr(layer, name) for name in ("keys", "values") if is_window(layer) and layer.is_initialized}
    if is_window(layer):
        if isinstance(layer, WindowLayer) and layer.places is not None:
            tensors["places"] = layer.places
        return {"kind": "window", "length": layer.cumulative_length}, tensors
    if isinstance(getattr(layer, "keys", None), Tensor):
        tensors |= {"keys": layer.keys, "values": layer.values}
    for name in STATES:
        tensors |= {f"{name}.{i}": state for i, state in getattr(layer, name, {}).items() if state is not None}
    said = {name: list(getattr(layer, name).values()) for name in FLAGS if hasattr(layer, name)}
    return {"kind": "state", **said}, tensors


def check_state(layer: Any, entry: Entry, tensors: Mapping[str, Tensor], read: tuple[int, int] | None) -> None:
    """Raise ValueError unless `state_of` could have given this for such a layer.

    `read`: rows and columns that the layers on pages have read; None: there are no such layers.
    """
    if isinstance(layer, CodedWindow):
        check_window(layer, entry, tensors, *((0, 0) if read is None else read))
        return
    allowed = {"keys", "values"} if hasattr(layer, "keys") else set()
    if is_window(layer):
        entry.integer("length", high=LARGEST if read is None else read[1])
        allowed |= {"places"} if isinstance(layer, WindowLayer) else set()
    for name in FLAGS if not is_window(layer) else ():
        states = getattr(layer, name, {})
        kinds = (int, type(None)) if name == "conv_kernel_size" else (bool,)
        if any(type(each) not in kinds for each in (entry.items(name, len(states)) if states else ())):
            raise entry.fail(name, "numbers or null" if int in kinds else "true or false")
    allowed |= {f"{name}.{number}" for name in STATES for number in getattr(layer, name, {})}
    if strange := sorted(tensors.keys() - allowed):
        raise ValueError(f"{entry.where} has a tensor {strange[0]!r}, which such a layer does not have")
    if ("keys" in tensors) != ("values" in tensors) or ("places" in tensors and "keys" not in tensors):
        raise ValueError(f"{entry.where} has {sorted(tensors)}, of which one lacks")
    rows = {len(tensor) if tensor.dim() else -1 for tensor in tensors.values()}
    if len(rows | ({read[0]} if read is not None else set())) > 1:
        raise ValueError(f"{entry.where} has tensors of {sorted(rows)} rows" + (f", not {read[0]}" if read else ""))
    if "keys" in tensors:
        _check_tokens(entry, tensors)


def _check_tokens(entry: Entry, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless keys, values and places are those of the same tokens."""
    keys, values = tensors["keys"], tensors["values"]
    places = tensors.get("places", keys.new_zeros(len(keys), *keys.shape[2:3], dtype=torch.int32))
    alike = keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3] and keys.dtype == values.dtype
    if not alike or not keys.is_floating_point() or places.shape != (len(keys), keys.shape[2]):
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        raise ValueError(f"{entry.where} has {shapes}, which are not those of the same tokens")
    if places.is_floating_point() or places.dtype == torch.bool:
        raise ValueError(f"{entry.where} has places of {places.dtype}")


def restore(layer: Any, said: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Fill an empty layer with what `state_of` gave."""
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    if "keys" in there:
        layer.is_initialized, layer.device, layer.dtype = True, device, there["keys"].dtype
        layer.lazy_initialization(there["keys"], there["values"])
        layer.keys, layer.values = there["keys"], there["values"]
    if said["kind"] == "window":
        layer.cumulative_length = said["length"]
        layer.places = there.get("places")
        return
    for name in STATES:
        for number in getattr(layer, name, {}):
            state = there.get(f"{name}.{number}")
            if state is not None:
                getattr(layer, name)[number], layer.device, layer.dtype = state, device, state.dtype
    for name in FLAGS:
        if name in said:
            setattr(layer, name, dict(enumerate(said[name])))


def is_window(layer: Any) -> bool:
    """Whether a layer keeps a sliding window and counts what it has read."""
    return hasattr(layer, "sliding_window") and hasattr(layer, "cumulative_length")
