"""Units of tokens with the compiled kernels: the index is read once for all heads of a group, and no mask is made."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import bits, fits, floats, library, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.units import naive


def is_here(x: Tensor) -> bool:
    """Whether its tables are read by kernels of this machine, whatever lies on its pages."""
    return x.device.type == "cpu" and library() is not None


def is_float32(x: Tensor) -> bool:
    """Whether the kernel can take such scores; no gradient is lost, as numbers of units have none."""
    return x.dtype == torch.float32 and is_here(x)


@register("raise_bounds", "cpu", rank=10, fits=fits)
def raise_bounds(held: Tensor, keys: Tensor, valid: Tensor, start: np.ndarray, unit: int) -> None:
    if not held.is_contiguous():
        naive.raise_bounds(held, keys, valid, start, unit)
        return
    from kvfold.ops import _cpu

    (b, h, n, e), t = held.shape, keys.shape[2]
    _cpu.raise_bounds(
        bits(held).reshape(b * h, n, e), bits(keys.detach()).reshape(b * h, t, e // 2),
        valid.contiguous().numpy().reshape(b * h, t), _whole(start), unit, threads(),
    )  # fmt: skip


@register("bound_scores", "cpu", rank=10, fits=fits)
def bound_scores(q: Tensor, held: Tensor, units: np.ndarray) -> Tensor:
    (b, h, g, d), number = q.shape, int(units.max(initial=0))
    if not held.is_contiguous() or not g or not d or not widths_fit(2 * d):
        return naive.bound_scores(q, held, units)
    from kvfold.ops import _cpu

    scores = np.empty((b, h, g, number), dtype=np.float32)
    _cpu.bound_scores(
        floats(q.detach()).reshape(b * h, g, d), bits(held).reshape(b * h, *held.shape[2:]), _whole(units), threads(),
        scores.reshape(b * h, g, number),
    )  # fmt: skip
    return torch.from_numpy(scores)


@register("choose_units", "cpu", rank=10, fits=is_float32)
def choose_units(
    scores: Tensor, units: np.ndarray, room: np.ndarray, *, heads: str, sinks: int, recent: int
) -> tuple[np.ndarray, np.ndarray]:
    if not scores.shape[2]:
        return naive.choose_units(scores, units, room, heads=heads, sinks=sinks, recent=recent)
    from kvfold.ops import _cpu

    (b, h, g, n), able = scores.shape, np.minimum(units, room[:, None])
    lists, most = g if heads == "each" else 1, int(able.max(initial=0))
    numbers, counts = np.empty((b, h, lists, most), dtype=np.int32), np.empty((b, h, lists), dtype=np.int32)
    _cpu.choose_units(
        floats(scores.detach()).reshape(b * h, g, n), _whole(units), _whole(able), heads, sinks, recent, threads(),
        numbers.reshape(b * h * lists, most), counts.reshape(-1),
    )  # fmt: skip
    return numbers, counts


@register("list_pages", "cpu", rank=10, fits=is_here)
def list_pages(table: Any, numbers: np.ndarray, pages: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _listed(table, numbers, pages, before, slots=False)


@register("list_slots", "cpu", rank=10, fits=is_here)
def list_slots(table: Any, numbers: np.ndarray, unit: int, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return _listed(table, numbers, unit, before, slots=True)


def _listed(
    table: Any, numbers: np.ndarray, each: int, before: np.ndarray, *, slots: bool
) -> tuple[np.ndarray, np.ndarray]:
    from kvfold.ops import _cpu

    rows, lists, most = numbers.shape
    listed, lengths = np.empty((rows * lists, most * each), dtype=np.int32), np.empty(rows * lists, dtype=np.int32)
    _cpu.list_pages(
        np.ascontiguousarray(numbers).reshape(rows * lists, most), table.table, table.lengths, table.pool.page_size,
        slots, each, _whole(before), listed, lengths,
    )  # fmt: skip
    return listed, lengths


def _whole(counts: np.ndarray) -> np.ndarray:
    """Numbers of rows as the kernels take them, (B * H,)."""
    return np.ascontiguousarray(counts, dtype=np.int64).reshape(-1)
