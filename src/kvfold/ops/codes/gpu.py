"""Attention over pages of codes with a Triton kernel on CUDA, where it fits; the definition for the rest."""

from typing import Any

from torch import Tensor

from kvfold.ops.codes import naive
from kvfold.ops.cpu import FLOATS
from kvfold.ops.dispatch import register
from kvfold.ops.gpu import answers, attend_rows, fits

SHARED = ("key_scale", "key_zero", "value_scale", "value_zero")


@register("attend_codes", "triton", rank=20, fits=fits)
def attend_codes(
    q: Tensor, table: Any, scale: float, *, bits: int, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    planes = table.pool.planes
    floats = all(planes[name].dtype in FLOATS for name in SHARED)
    if compact is not None or not floats or not answers(q, table, mass, q.shape[4], value_size):
        return naive.attend_codes(
            q, table, scale, bits=bits, value_size=value_size, mass=mass, read=read, compact=compact,
            position=position, weights=weights,
        )  # fmt: skip
    from kvfold.ops.codes import triton_kernels

    return attend_rows(
        triton_kernels.attend, q, table, scale, dv=value_size, mass=mass, read=read, weights=weights, bits=bits,
        value_size=value_size, keys=(planes["keys"], planes["key_scale"], planes["key_zero"]),
        values=(planes["values"], planes["value_scale"], planes["value_zero"]),
    )  # fmt: skip
