"""Segments whose pages another layer may hold too, as tensors of a file: what is shared is written once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold import ops
from kvfold.formats import POSITION, Chunk, Depth, DepthSegment
from kvfold.formats.depth import KEY_NORM, VALUE_NORM
from kvfold.pages import Plane


def save_depth(
    form: Depth, segment: DepthSegment, prefix: str, tensors: dict[str, Tensor], written: dict[str, DepthSegment]
) -> dict[str, Any]:
    """Add the planes to `tensors`, unless a segment that is `written` has the same; what the header says."""
    valid = segment.dense().valid
    segment.keep(valid, {})  # no gaps, as in the loaded one
    valid = segment.dense().valid
    twin = next((name for name, other in written.items() if segment.longest and other.twin(segment)), None)
    if twin is None:
        for name in segment.pool.planes:
            plane = segment.table.dense(name)
            tensors[f"{prefix}.{name}"] = plane.view(*valid.shape, *plane.shape[2:])[valid].contiguous()
    if segment.state is not None:
        tensors[f"{prefix}.state"] = segment.state.contiguous()
    written[prefix] = segment
    said = {"side": form.side, "dtype": None, "page_size": form.page_size, "of": twin}
    return said | {"counts": segment.counts().tolist(), "upto": segment.upto.tolist()}


def own_planes(said: dict[str, Any], total: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of the planes that an entry of the header must have beside keys and values."""
    if "side" not in said or not total:
        return {}
    lengths = {f"{name}.{said['side']}": ((total,), "float32") for name in (KEY_NORM, VALUE_NORM)}
    return {POSITION: ((total,), "int32"), **lengths}


def load_depth(
    said: dict[str, Any], prefix: str, tensors: dict[str, Tensor], sizes: Sequence[int], dtype: torch.dtype,
    device: torch.device, made: dict[str, DepthSegment],
) -> tuple[Depth, DepthSegment]:  # fmt: skip
    """The segment of a header's entry; `sizes`: H, D, D_v of the layer; `made`: those that were read before it."""
    heads, d, dv = sizes
    counts = torch.tensor(said["counts"], dtype=torch.int64).reshape(-1, heads)
    form = Depth(said["side"], said["page_size"])
    valid = torch.arange(int(counts.max()) if counts.numel() else 0) < counts[..., None]
    keys, values = (torch.zeros(*valid.shape[:2], 0, size, dtype=dtype, device=device) for size in (d, dv))
    segment = form.segment(Chunk(keys, values, valid[..., :0].to(device)))
    if said["of"] is not None:
        segment.table = made[said["of"]].table.fork()
    else:
        rows = {}
        for name in [n.removeprefix(f"{prefix}.") for n in tensors if n.startswith(f"{prefix}.")]:
            flat = tensors[f"{prefix}.{name}"]
            if name != "state":
                if name not in segment.pool.planes:
                    segment.pool.add_plane(name, Plane(None, flat.dtype))
                wide = torch.zeros(*valid.shape, *flat.shape[1:], dtype=flat.dtype)
                wide[valid] = flat
                rows[name] = wide.flatten(0, 1).to(device)
        ops.append_pages(segment.table, rows, None if bool(valid.all()) else valid.flatten(0, 1).to(device))
    segment.upto = np.array(said["upto"], dtype=np.int64)
    state = tensors.get(f"{prefix}.state")
    segment.state = None if state is None else state.to(device)
    made[prefix] = segment
    return form, segment
