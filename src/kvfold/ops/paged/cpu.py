"""Operations on pages with the compiled kernels, where they fit; the definition for the rest."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import BITS, fits, floats, holds, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.paged import naive

ROWS = 64
"""Queries of a row (heads of its group times queries) up to which the kernel reads faster than a dense product."""

PAGE_SIZES = (4, 8, 16, 32, 64)
"""Whole pages make a block of 64 tokens, and a product takes four tokens at once."""


@register("attend_pages", "cpu", rank=10, fits=fits)
def attend_pages(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    (b, h, g, n, d), pool = q.shape, table.pool
    dv, t = pool.planes["values"].shape[-1], table.longest
    if compact is not None or not t or not _readable(pool, g * n, d, mass):
        return naive.attend_pages(
            q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    out, lse, probabilities = _attend(q, table, scale, mass, read, weights)
    shaped = None if probabilities is None else probabilities.view(b, h, g, n, t)
    return out.to(q.dtype).view(b, h, g, n, dv), lse.view(b, h, g, n), shaped


def _attend(
    q: Tensor, table: Any, scale: float, mass: str | None, read: Tensor | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q (B, H, G, Q, D): out (R, G * Q, Dv), lse (R, G * Q) and, with `weights`, probabilities (R, G * Q, T)."""
    from kvfold.ops import _cpu

    (b, h, g, n, d), pool = q.shape, table.pool
    rows, values = b * h, pool.array("values")
    out, lse = _empty(rows, g * n, values.shape[1]), _empty(rows, g * n)
    probabilities = _empty(rows, g * n, table.longest) if weights else None
    _cpu.attend(
        floats(q.reshape(rows, g * n, d)), pool.array("keys"), values, None if mass is None else pool.array(mass),
        None if read is None else read.reshape(rows, -1).contiguous().numpy(),
        table.table, table.lengths, table.holes, table.hole_count, pool.page_size, scale, threads(),
        out.numpy(), lse.numpy(), None if probabilities is None else probabilities.numpy(),
    )  # fmt: skip
    return out, lse, probabilities


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


@register("step_pages", "cpu", rank=10, fits=fits)
def step_pages(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], scale: float, *, mass: str | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    (b, h, g, _, d), pool, new, value = q.shape, table.pool, planes["keys"], planes["values"]
    dv, kind = value.shape[-1], pool.planes["keys"].dtype
    if new.dtype != kind or value.dtype != pool.planes["values"].dtype or not _readable(pool, g, d, mass):
        return naive.step_pages(q, table, planes, scale, mass=mass, weights=weights)
    append(table, planes, 1)
    out, lse, probabilities = _attend(q, table, scale, mass, None, weights)
    shaped = None if probabilities is None else probabilities.view(b, h, g, 1, table.longest)
    return out.to(q.dtype).view(b, h, g, 1, dv), lse.view(b, h, g, 1), shaped


@register("append_pages", "cpu", rank=10, fits=holds)
def append_pages(table: Any, planes: Mapping[str, Tensor], valid: Tensor | None) -> None:
    count = planes["keys"].shape[1]
    if valid is not None or (table.regular and table.even):
        naive.append_pages(table, planes, valid)
        return
    append(table, planes, count)


def append(table: Any, planes: Mapping[str, Tensor], count: int) -> None:
    """`count` tokens to the end of each row: `planes` (R, count, ...), the pool's fill where one is missing."""
    from kvfold.ops import _cpu

    start = table.extend(count)
    pool = table.pool
    for name, spec in pool.specs.items():
        kind = pool.planes[name].dtype
        new = (planes[name] if name in planes else _fill(spec, table.rows, count)).to(kind)
        _cpu.write(pool.array(name), _rows(new), table.table, start, table.lengths, pool.page_size)


@register("keep_pages", "cpu", rank=10, fits=holds)
def keep_pages(table: Any, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool) -> None:
    if table.shared and (columns or not slack):
        naive.keep_pages(table, mask, columns, slack=slack)
        return
    from kvfold.ops import _cpu

    keep, before, pool = mask.contiguous().numpy(), table.lengths, table.pool
    if slack:
        holes, hole_count = table.copy_holes()
        if _cpu.punch_holes(keep, before, holes, hole_count):
            table.holes, table.hole_count = holes, hole_count
            _set_columns(table, columns)
            return
    if table.shared:
        naive.keep_pages(table, mask, columns, slack=slack)
        return
    _set_columns(table, columns)
    counts = keep.sum(1).astype(np.int32)
    if (counts == before).all():
        return
    for name in pool.planes:
        _cpu.close_gaps(pool.array(name), keep, table.table, before, pool.page_size, threads())
    naive.shorten(table, counts)


def _fill(spec: Any, rows: int, count: int) -> Tensor:
    """What a plane gets where nobody says."""
    return torch.full(
        (rows, count) if spec.width is None else (rows, count, spec.width), spec.fill, dtype=torch.float32
    )


def _readable(pool: Any, queries: int, d: int, mass: str | None) -> bool:
    """Whether the kernel can answer so many queries of a row over the pages of this pool."""
    keys, values = pool.planes["keys"], pool.planes["values"]
    masses = mass is None or pool.planes[mass].dtype == torch.float32
    sizes = 0 < queries <= ROWS and d > 0 and pool.page_size in PAGE_SIZES and widths_fit(d, values.shape[-1])
    return fits(keys) and fits(values) and masses and sizes


def _set_columns(table: Any, columns: Mapping[str, Tensor]) -> None:
    """Write columns (R, T) over all slots; no page is shared."""
    from kvfold.ops import _cpu

    pool, start = table.pool, np.zeros(table.rows, dtype=np.int32)
    for name, new in columns.items():
        _cpu.write(
            pool.array(name), _rows(new.to(pool.planes[name].dtype)), table.table, start, table.lengths, pool.page_size
        )


def _rows(new: Tensor) -> np.ndarray:
    """(R, T, ...) as (R, T, W), the way pools show their planes."""
    kind = BITS.get(new.dtype, new.dtype)
    array: np.ndarray = (new if new.dim() == 3 else new[..., None]).contiguous().view(kind).numpy()
    return array
