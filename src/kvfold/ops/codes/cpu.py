"""Attention over pages of codes with the compiled kernel, where it fits; the definition for the rest."""

from typing import Any

from torch import Tensor

from kvfold.ops.codes import naive
from kvfold.ops.cpu import answers, fits
from kvfold.ops.dispatch import register
from kvfold.ops.rows import attend_rows

PLANES = ("keys", "key_scale", "key_zero", "values", "value_scale", "value_zero")


@register("attend_codes", "cpu", rank=10, fits=fits)
def attend_codes(
    q: Tensor, table: Any, scale: float, *, bits: int, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    queries, d, pool = q.shape[2] * q.shape[3], q.shape[4], table.pool
    if compact is not None or not table.longest or not _readable(pool, queries, d, value_size, mass):
        return naive.attend_codes(
            q, table, scale, bits=bits, value_size=value_size, mass=mass, read=read, compact=compact,
            position=position, weights=weights,
        )  # fmt: skip
    from kvfold.ops import _cpu

    def planes(pool: Any) -> tuple[Any, ...]:
        return bits, *(pool.array(name) for name in PLANES)

    return attend_rows(_cpu.attend_codes, planes, q, table, scale, dv=value_size, mass=mass, read=read, weights=weights)


def _readable(pool: Any, queries: int, d: int, dv: int, mass: str | None) -> bool:
    """Whether the kernel can answer so many queries of a row over the pages of this pool."""
    scales = [pool.planes[name] for name in ("key_scale", "key_zero", "value_scale", "value_zero")]
    sizes = pool.page_size % 4 == 0 and answers(pool, queries, mass, d, dv, dv // scales[2].shape[-1])
    return sizes and all(fits(x) and x.dtype == scales[0].dtype for x in scales)
