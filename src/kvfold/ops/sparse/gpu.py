"""Attention over pages of kept numbers with a Triton kernel on CUDA, where it fits; the definition for the rest."""

from typing import Any

from torch import Tensor

from kvfold.ops.cpu import FLOATS
from kvfold.ops.dispatch import register
from kvfold.ops.gpu import answers, attend_rows, fits
from kvfold.ops.sparse import naive


@register("attend_sparse", "triton", rank=20, fits=fits)
def attend_sparse(
    q: Tensor, table: Any, scale: float, *, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    planes = table.pool.planes
    floats = planes["keys"].dtype in FLOATS and planes["values"].dtype in FLOATS
    if compact is not None or not floats or not answers(q, table, mass, q.shape[4], value_size):
        return naive.attend_sparse(
            q, table, scale, value_size=value_size, mass=mass, read=read, compact=compact, position=position,
            weights=weights,
        )  # fmt: skip
    from kvfold.ops.sparse import triton_kernels

    return attend_rows(
        triton_kernels.attend, q, table, scale, dv=value_size, mass=mass, read=read, weights=weights,
        value_size=value_size, keys=(planes["keys"], planes["key_map"]),
        values=(planes["values"], planes["value_map"]),
    )  # fmt: skip
