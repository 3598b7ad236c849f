"""Attention over pages of kept numbers with the compiled kernel, where it fits; the definition for the rest."""

from typing import Any

from torch import Tensor

from kvfold.ops.cpu import PAGE_SIZES, answers, fits
from kvfold.ops.dispatch import register
from kvfold.ops.rows import attend_rows
from kvfold.ops.sparse import naive

PLANES = ("keys", "key_map", "values", "value_map")


@register("attend_sparse", "cpu", rank=10, fits=fits)
def attend_sparse(
    q: Tensor, table: Any, scale: float, *, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    queries, d, pool = q.shape[2] * q.shape[3], q.shape[4], table.pool
    if compact is not None or not table.longest or not _readable(pool, queries, d, value_size, mass):
        return naive.attend_sparse(
            q, table, scale, value_size=value_size, mass=mass, read=read, compact=compact, position=position,
            weights=weights,
        )  # fmt: skip
    from kvfold.ops import _cpu

    def planes(pool: Any) -> tuple[Any, ...]:
        return tuple(pool.array(name) for name in PLANES)

    return attend_rows(
        _cpu.attend_sparse, planes, q, table, scale, dv=value_size, mass=mass, read=read, weights=weights
    )


def _readable(pool: Any, queries: int, d: int, dv: int, mass: str | None) -> bool:
    """Whether the kernel can answer so many queries of a row over the pages of this pool."""
    numbers = fits(pool.planes["keys"]) and fits(pool.planes["values"])
    return numbers and pool.page_size in PAGE_SIZES and answers(pool, queries, mass, d, dv)
