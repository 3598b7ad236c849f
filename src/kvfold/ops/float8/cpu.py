"""Attention over 8-bit floats with the compiled kernel, where it fits; the definition for the rest."""

from typing import Any

import torch
from torch import Tensor

from kvfold.ops.cpu import PAGE_SIZES, answers, fits
from kvfold.ops.dispatch import register
from kvfold.ops.float8 import naive
from kvfold.ops.rows import attend_rows

PLANES = ("keys", "values", "key_scale", "value_scale")


@register("attend_float8", "cpu", rank=10, fits=fits)
def attend_float8(
    q: Tensor, table: Any, scale: float, *, kind: torch.dtype,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    queries, d, pool = q.shape[2] * q.shape[3], q.shape[4], table.pool
    dv = pool.specs["values"].width
    readable = pool.page_size in PAGE_SIZES and fits(pool.planes["key_scale"]) and answers(pool, queries, mass, d, dv)
    if compact is not None or not table.longest or not readable:
        return naive.attend_float8(
            q, table, scale, kind=kind, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    from kvfold.ops import _cpu

    def planes(pool: Any) -> tuple[Any, ...]:
        return (kind == torch.float8_e5m2, *(pool.array(name) for name in PLANES))

    return attend_rows(_cpu.attend_float8, planes, q, table, scale, dv=dv, mass=mass, read=read, weights=weights)
