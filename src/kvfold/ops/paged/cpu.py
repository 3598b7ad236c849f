"""Operations on pages with Numba kernels, where they fit; the definition for the rest."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import BITS, fits, floats, holds, use_threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.paged import naive

ROWS = 64
"""Queries of a row (heads of its group times queries) up to which the kernel reads faster than a dense product."""

PAGE_SIZES = (4, 8, 16, 32, 64)
"""Whole pages make a block of 64 tokens, and a product takes four tokens at once."""

_NO_READ, _NO_MASS = np.empty((0, 0), dtype=np.bool_), np.empty((0, 1), dtype=np.float32)
_NO_WEIGHTS = np.empty((0, 0, 0), dtype=np.float32)


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
    from kvfold.ops.paged import cpu_kernels

    out = torch.empty(b * h, g * n, dv, dtype=torch.float32)
    lse = torch.empty(b * h, g * n, dtype=torch.float32)
    probabilities = torch.empty(b * h, g * n, t, dtype=torch.float32) if weights else None
    cpu_kernels.attend(
        floats(q.reshape(b * h, g * n, d)), pool.array("keys"), pool.array("values"),
        _NO_MASS if mass is None else pool.array(mass),
        _NO_READ if read is None else read.reshape(b * h, -1).contiguous().numpy(),
        table.table, table.lengths, table.holes, table.hole_count, pool.page_size, np.float32(scale), use_threads(),
        out.numpy(), lse.numpy(), _NO_WEIGHTS if probabilities is None else probabilities.numpy(),
    )  # fmt: skip
    shaped = None if probabilities is None else probabilities.view(b, h, g, n, t)
    return out.to(q.dtype).view(b, h, g, n, dv), lse.view(b, h, g, n), shaped


@register("step_pages", "cpu", rank=10, fits=fits)
def step_pages(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], scale: float, *, mass: str | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    (b, h, g, _, d), pool, new, value = q.shape, table.pool, planes["keys"], planes["values"]
    dv, kind = value.shape[-1], pool.planes["keys"].dtype
    if new.dtype != kind or value.dtype != pool.planes["values"].dtype or not _readable(pool, g, d, mass):
        return naive.step_pages(q, table, planes, scale, mass=mass, weights=weights)
    from kvfold.ops.paged import cpu_kernels

    start = table.extend(1)
    pool = table.pool
    for name, spec in pool.specs.items():
        if name not in ("keys", "values"):
            given = planes.get(name)
            column = _fill(spec, b * h, 1) if given is None else given
            column = column.to(pool.planes[name].dtype)
            cpu_kernels.write_one(pool.array(name), _rows(column)[:, 0], table.table, start, pool.page_size)
    t = table.longest
    out, lse = torch.empty(b * h, g, dv, dtype=torch.float32), torch.empty(b * h, g, dtype=torch.float32)
    probabilities = torch.empty(b * h, g, t, dtype=torch.float32) if weights else None
    cpu_kernels.step(
        _rows(new)[:, 0], _rows(value)[:, 0], start, floats(q.reshape(b * h, g, d)),
        pool.array("keys"), pool.array("values"), _NO_MASS if mass is None else pool.array(mass), _NO_READ,
        table.table, table.lengths, table.holes, table.hole_count, pool.page_size, np.float32(scale), use_threads(),
        out.numpy(), lse.numpy(), _NO_WEIGHTS if probabilities is None else probabilities.numpy(),
    )  # fmt: skip
    shaped = None if probabilities is None else probabilities.view(b, h, g, 1, t)
    return out.to(q.dtype).view(b, h, g, 1, dv), lse.view(b, h, g, 1), shaped


@register("append_pages", "cpu", rank=10, fits=holds)
def append_pages(table: Any, planes: Mapping[str, Tensor], valid: Tensor | None) -> None:
    count = planes["keys"].shape[1]
    if valid is not None or (table.regular and table.even):
        naive.append_pages(table, planes, valid)
        return
    from kvfold.ops.paged import cpu_kernels

    start = table.extend(count)
    pool = table.pool
    for name, spec in pool.specs.items():
        kind = pool.planes[name].dtype
        new = (planes[name] if name in planes else _fill(spec, table.rows, count)).to(kind)
        cpu_kernels.write(pool.array(name), _rows(new), table.table, start, table.lengths, pool.page_size)


@register("keep_pages", "cpu", rank=10, fits=holds)
def keep_pages(table: Any, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool) -> None:
    if table.shared and (columns or not slack):
        naive.keep_pages(table, mask, columns, slack=slack)
        return
    from kvfold.ops.paged import cpu_kernels

    keep, more, before, pool = mask.contiguous().numpy(), np.empty(table.rows, np.int32), table.lengths, table.pool
    if slack:
        holes, hole_count = table.copy_holes()
        if cpu_kernels.punch_holes(keep, before, holes, hole_count, more):
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
    use_threads()
    for name in pool.planes:
        cpu_kernels.close_gaps(pool.array(name), keep, table.table, before, pool.page_size)
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
    sizes = queries <= ROWS and pool.page_size in PAGE_SIZES and widths_fit(d, values.shape[-1])
    return fits(keys) and masses and sizes


def _set_columns(table: Any, columns: Mapping[str, Tensor]) -> None:
    """Write columns (R, T) over all slots; no page is shared."""
    from kvfold.ops.paged import cpu_kernels

    pool, start = table.pool, np.zeros(table.rows, dtype=np.int32)
    start.flags.writeable = False  # as lengths are: another kind of array would be compiled for anew
    for name, new in columns.items():
        cpu_kernels.write(
            pool.array(name), _rows(new.to(pool.planes[name].dtype)), table.table, start, table.lengths, pool.page_size
        )


def _rows(new: Tensor) -> np.ndarray:
    """(R, T, ...) as (R, T, W), the way pools show their planes."""
    kind = BITS.get(new.dtype, new.dtype)
    array: np.ndarray = (new if new.dim() == 3 else new[..., None]).contiguous().view(kind).numpy()
    return array
