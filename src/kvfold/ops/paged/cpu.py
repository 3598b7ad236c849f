"""Operations on pages with the compiled kernels, where they fit; the definition for the rest."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import BITS, fits, floats, holds, reads_pages, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.paged import naive
from kvfold.ops.rows import attend_rows
from kvfold.ops.turn.pairs import Pairs, pairs_of

PLANES = ("keys", "values")


@register("attend_pages", "cpu", rank=10, fits=fits)
def attend_pages(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    queries, d = q.shape[2] * q.shape[3], q.shape[4]
    here = table.pool.page_size == 1 and table.pool.memory is None and not table.holed
    if here and _turns(compact, read, weights=weights):
        pairs, able = pairs_of(compact.rope), table.longest and reads_pages(table.pool, queries, d, mass)
        if pairs is not None and able and widths_fit(len(pairs.angles), pairs.first):
            return _attend_turned(q, table, scale, mass, pairs, _least(compact, q.shape[1]), position)
    if compact is not None or not table.longest or not reads_pages(table.pool, queries, d, mass):
        return naive.attend_pages(
            q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    return _attend(q, table, scale, mass, read, weights)


def _attend(
    q: Tensor, table: Any, scale: float, mass: str | None, read: Tensor | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from kvfold.ops import _cpu

    dv = table.pool.specs["values"].width
    return attend_rows(_cpu.attend, PLANES, q, table, scale, dv=dv, mass=mass, read=read, weights=weights)


def _turns(compact: Any, read: Tensor | None, *, weights: bool) -> bool:
    """Whether keys turn to the numbers of their slots, or to a least place, and nothing else is wanted."""
    return compact is not None and compact.slots is None and read is None and not weights


def _least(compact: Any, heads: int) -> np.ndarray | None:
    """Where keys of each (row, head) stand at least, -1: at slots; None: all at slots."""
    if compact.least is None and compact.rows is None:
        return None
    least = np.where(compact.rows.numpy(), -1, 0) if compact.least is None else compact.least.clamp(min=0).numpy()
    wide: np.ndarray = np.repeat(least.astype(np.int32), heads)
    return wide


def _attend_turned(
    q: Tensor, table: Any, scale: float, mass: str | None, pairs: Pairs, least: np.ndarray | None, position: str
) -> tuple[Tensor, Tensor, None]:
    """Over rows of tokens each of which is a page of its own: keys turn as they are read."""
    from kvfold.ops import _cpu

    (b, h, g, n, d), pool = q.shape, table.pool
    out = np.empty((b, h, g, n, pool.specs["values"].width), dtype=np.float32)
    lse = np.empty((b, h, g, n), dtype=np.float32)
    _cpu.attend_turned(
        floats(q).reshape(b * h, g * n, d), pool.array("keys"), pool.array("values"), pool.array(position),
        pairs.angles, pairs.first, pairs.neighbours, least,
        None if mass is None else pool.array(mass), table.table, table.lengths, table.holes, table.hole_count, scale,
        threads(), out.reshape(b * h, g * n, -1), lse.reshape(b * h, -1),
    )  # fmt: skip
    found = torch.from_numpy(out)
    return found if q.dtype == torch.float32 else found.to(q.dtype), torch.from_numpy(lse), None


@register("step_pages", "cpu", rank=10, fits=fits)
def step_pages(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], scale: float, *, mass: str | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    pool, specs = table.pool, table.pool.specs
    known = planes["keys"].dtype == specs["keys"].dtype and planes["values"].dtype == specs["values"].dtype
    if not known or not reads_pages(pool, q.shape[2], q.shape[4], mass):
        return naive.step_pages(q, table, planes, scale, mass=mass, weights=weights)
    append(table, planes, 1)
    return _attend(q, table, scale, mass, None, weights)


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

    start, pool = table.extend(count), table.pool
    for first, last in ((0, count),) if pool.memory is None else pool.memory.appended(table, start, count, planes):
        begin, stop = start + np.int32(first), start + np.int32(last)
        for name, spec in pool.specs.items():
            new = planes[name][:, first:last] if name in planes else _fill(spec, table.rows, last - first)
            _cpu.write(pool.array(name), _rows(new, spec.dtype), table.table, begin, stop, pool.page_size)


@register("keep_pages", "cpu", rank=10, fits=holds)
def keep_pages(table: Any, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool) -> None:
    # What is in memory in part is moved stretch by stretch, unless all of it fits.
    parts = table.pool.memory is not None and not table.pool.memory.holds(table)
    if parts or (table.shared and (columns or not slack)):
        naive.keep_pages(table, mask, columns, slack=slack)
        return
    from kvfold.ops import _cpu

    before, pool = table.lengths, table.pool
    keep = pool.lowered(mask).contiguous().numpy()
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
    pool.wrote(pool.planes, _behind_gaps(table, keep))
    for name in pool.planes:
        _cpu.close_gaps(pool.array(name), keep, table.table, before, pool.page_size, threads())
    naive.shorten(table, counts)


def _behind_gaps(table: Any, keep: np.ndarray) -> np.ndarray:
    """The pages from the first on of which each row drops a token."""
    gaps = np.where(~keep, np.arange(keep.shape[1]), table.lengths[:, None]).min(1, initial=keep.shape[1])
    index = np.arange(table.table.shape[1])
    pages: np.ndarray = table.table[(index >= (gaps // table.pool.page_size)[:, None]) & (table.table >= 0)]
    return pages


def _fill(spec: Any, rows: int, count: int) -> Tensor:
    """What a plane gets where nobody says."""
    return torch.full(
        (rows, count) if spec.width is None else (rows, count, spec.width), spec.fill, dtype=torch.float32
    )


def _set_columns(table: Any, columns: Mapping[str, Tensor]) -> None:
    """Write columns (R, T) over all slots; no page is shared."""
    from kvfold.ops import _cpu

    pool, start = table.pool, np.zeros(table.rows, dtype=np.int32)
    pool.wrote(columns, table.held)
    for name, new in columns.items():
        rows = _rows(pool.lowered(new), pool.specs[name].dtype)
        _cpu.write(pool.array(name), rows, table.table, start, table.lengths, pool.page_size)


def _rows(new: Tensor, dtype: torch.dtype) -> np.ndarray:
    """(R, T, ...) as (R, T, W), the way pools show their planes."""
    plane, kind = (new if new.dtype == dtype else new.to(dtype)).contiguous(), BITS.get(dtype)
    array: np.ndarray = (plane if kind is None else plane.view(kind)).numpy()
    return array if array.ndim == 3 else array[..., None]
