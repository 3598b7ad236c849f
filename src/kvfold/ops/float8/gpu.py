"""Attention over 8-bit floats (e4m3) with a Triton kernel on CUDA, where it fits; the definition for the rest."""

from typing import Any

import torch
from torch import Tensor

from kvfold.ops.dispatch import register
from kvfold.ops.float8 import naive
from kvfold.ops.gpu import answers, attend_rows, fits


@register("attend_float8", "triton", rank=20, fits=fits)
def attend_float8(
    q: Tensor, table: Any, scale: float, *, kind: torch.dtype,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    planes = table.pool.planes
    dv = planes["values"].shape[-1]
    if kind != torch.float8_e4m3fn or compact is not None or not answers(q, table, mass, q.shape[4], dv):
        return naive.attend_float8(
            q, table, scale, kind=kind, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    from kvfold.ops.float8 import triton_kernels

    return attend_rows(
        triton_kernels.attend, q, table, scale, dv=dv, mass=mass, read=read, weights=weights,
        keys=(planes["keys"], planes["key_scale"]), values=(planes["values"], planes["value_scale"]),
    )  # fmt: skip
