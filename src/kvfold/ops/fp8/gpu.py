"""Attention over numbers of eight bits with a Triton kernel on CUDA, where it fits; the definition for the rest."""

from typing import Any

from torch import Tensor

from kvfold.ops.dispatch import register
from kvfold.ops.fp8 import naive
from kvfold.ops.gpu import answers, attend_rows, fits


@register("attend_fp8", "triton", rank=20, fits=fits)
def attend_fp8(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    planes = table.pool.planes
    dv = planes["values"].shape[-1]
    if compact is not None or not answers(q, table, mass, q.shape[4], dv):
        return naive.attend_fp8(
            q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    from kvfold.ops.fp8 import triton_kernels

    return attend_rows(
        triton_kernels.attend, q, table, scale, dv=dv, mass=mass, read=read, weights=weights,
        keys=(planes["keys"], planes["key_scale"]), values=(planes["values"], planes["value_scale"]),
    )  # fmt: skip
