"""Sliding windows in codes, as files have them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.formats import Spec, format_from, format_to
from kvfold.hf.saving.said import Entry
from kvfold.hf.windows import CodedWindow
from kvfold.options import LARGEST


def window_state(layer: CodedWindow) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a layer holds, as JSON and tensors."""
    layer.settle()  # after a call that failed
    said: dict[str, Any] = {"kind": "window", "length": layer.cumulative_length, "held": None}
    if layer.segment is None:
        return said, {}
    told, tensors = layer.segment.state()
    shape = [layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]]
    dtype = str(layer.keys.dtype).removeprefix("torch.")
    return {**said, "held": {**format_to(layer.form), **told, "shape": shape, "dtype": dtype}}, tensors


def check_window(layer: CodedWindow, entry: Entry, tensors: Mapping[str, Tensor], rows: int, width: int) -> None:
    """Raise ValueError unless `window_state` could have given this for so many rows and columns."""
    length = entry.integer("length", high=min(width, LARGEST))
    if entry.null("held"):
        if tensors or length:
            raise ValueError(f"{entry.where} has held=null, and length={length} and tensors {sorted(tensors)}")
        return
    held = entry.part("held")
    spec = _spec(layer, held, rows, torch.device("cpu"))
    try:
        layer.form.check(spec, held.said, tensors, np.full(rows, length, dtype=np.int64))
    except ValueError as error:
        raise ValueError(f"{held.where} has {error}") from error
    counts = np.array(held.said["counts"], dtype=np.int64)
    if counts.max(initial=0) > min(length, layer.sliding_window + layer.unit - 1):
        raise held.fail("counts", f"at most {length} tokens of a window of {layer.sliding_window}")


def restore_window(
    layer: CodedWindow, said: Mapping[str, Any], tensors: Mapping[str, Tensor], rows: int, device: torch.device
) -> None:
    """Fill an empty layer with what `window_state` gave."""
    layer.cumulative_length = said["length"]
    if said["held"] is None:
        return
    held = Entry("its window", said["held"])
    spec = _spec(layer, held, rows, device)
    none = torch.empty(rows, spec.heads, 0, spec.key_size, dtype=spec.dtype, device=device)
    layer.lazy_initialization(none, none.new_empty(rows, spec.heads, 0, spec.value_size))
    layer.segment = layer.form.restore(spec, held.said, tensors)


def _spec(layer: CodedWindow, held: Entry, rows: int, device: torch.device) -> Spec:
    """The spec of the segment that a file holds. Raises ValueError where it is of another format."""
    if format_from(held.said) != layer.form:
        raise held.fail("format", str(layer.form))
    heads, size, values = held.integers("shape", 3).tolist()
    if 0 in (heads, size, values):
        raise held.fail("shape", "heads and the sizes of keys and values")
    return Spec(rows, heads, size, values, held.dtype("dtype"), device, layer=layer.index)
