"""Attention over tokens in codes with the compiled kernel, where it fits; the definition for the rest."""

from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from kvfold.ops.cpu import PAGE_SIZES, answers, fits
from kvfold.ops.dispatch import register
from kvfold.ops.rows import attend_rows
from kvfold.ops.tokens import naive
from kvfold.ops.tokens.coding import Coding


@register("attend_tokens", "cpu", rank=10, fits=fits)
def attend_tokens(
    q: Tensor, table: Any, scale: float, *, keys: Coding, values: Coding,
    mass: str | None, read: Tensor | None, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    pool = table.pool
    if not table.longest or not _readable(pool, q.shape[2] * q.shape[3], keys, values, mass):
        return naive.attend_tokens(q, table, scale, keys=keys, values=values, mass=mass, read=read, weights=weights)
    from kvfold.ops import _cpu

    def planes(pool: Any) -> tuple[Any, ...]:
        return (*_side(pool, "keys", keys), *_side(pool, "values", values))

    return attend_rows(
        _cpu.attend_tokens, planes, q, table, scale, dv=values.size, mass=mass, read=read, weights=weights
    )


def _side(pool: Any, what: str, coding: Coding) -> tuple[Any, ...]:
    kind = naive.KINDS[what]
    zero = pool.array(f"{kind}_zero") if coding.levels is None else None
    return coding.bits, pool.array(what), _levels(coding), pool.array(f"{kind}_scale"), zero


@cache
def _levels(coding: Coding) -> np.ndarray | None:
    return None if coding.levels is None else np.array(coding.levels, dtype=np.float32)


def _readable(pool: Any, queries: int, keys: Coding, values: Coding, mass: str | None) -> bool:
    """Whether the kernel can answer so many queries of a row over the pages of this pool."""
    scales = [pool.planes[f"{kind}_scale"] for kind in naive.KINDS.values()]
    widths = [width for x in (keys, values) for width in (x.size, x.size // x.groups)]
    sizes = pool.page_size in PAGE_SIZES and answers(pool, queries, mass, *widths)
    return sizes and all(fits(x) and x.dtype == scales[0].dtype for x in scales)
