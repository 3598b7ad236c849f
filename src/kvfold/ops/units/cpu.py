"""Units of tokens with the compiled kernels: the index is read once for all heads of a group, and no mask is made."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import FLOATS, bits, fits, floats, library, reads_pages, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.turn.pairs import pairs_of
from kvfold.ops.units import naive


def is_here(x: Tensor) -> bool:
    """Whether its tables are read by kernels of this machine, whatever lies on its pages."""
    return x.device.type == "cpu" and library() is not None


def is_float32(x: Tensor) -> bool:
    """Whether the kernel can take such scores; no gradient is lost, as numbers of units have none."""
    return x.dtype == torch.float32 and is_here(x)


@register("raise_bounds", "cpu", rank=10, fits=fits)
def raise_bounds(held: Tensor, keys: Tensor, valid: Tensor, start: np.ndarray, unit: int) -> None:
    if not held.is_contiguous() or not _rises(held, keys):
        naive.raise_bounds(held, keys, valid, start, unit)
        return
    from kvfold.ops import _cpu

    (b, h, n, e), t = held.shape, keys.shape[2]
    _cpu.raise_bounds(
        bits(held).reshape(b * h, n, e), bits(keys.detach()).reshape(b * h, t, e // 2),
        valid.contiguous().numpy().reshape(b * h, t), _whole(start), unit, threads(),
    )  # fmt: skip


def _rises(held: Tensor, keys: Tensor) -> bool:
    """Whether the kernel can raise such bounds to hold such keys."""
    return keys.dtype == held.dtype or (held.dtype, keys.dtype) == (torch.bfloat16, torch.float32)


@register("bound_scores", "cpu", rank=10, fits=fits)
def bound_scores(q: Tensor, held: Tensor, units: np.ndarray) -> Tensor:
    if not _multiplies(q, held):
        return naive.bound_scores(q, held, units)
    return _scores(q, held, units, plain=False, steps=0)


@register("key_scores", "cpu", rank=10, fits=fits)
def key_scores(q: Tensor, held: Tensor, units: np.ndarray, steps: int) -> Tensor:
    if not _multiplies(q, held):
        return naive.key_scores(q, held, units, steps)
    return _scores(q, held, units, plain=True, steps=steps)


def _multiplies(q: Tensor, held: Tensor) -> bool:
    """Whether the kernel can multiply a query with what is held."""
    return held.is_contiguous() and q.shape[2] > 0 and q.shape[3] > 0 and widths_fit(held.shape[3])


def _scores(q: Tensor, held: Tensor, units: np.ndarray, *, plain: bool, steps: int) -> Tensor:
    from kvfold.ops import _cpu

    (b, h, g, d), number = q.shape, int(units.max(initial=0))
    scores = np.empty((b, h, g, number), dtype=np.float32)
    _cpu.bound_scores(
        floats(q.detach()).reshape(b * h, g, d), bits(held).reshape(b * h, *held.shape[2:]), _whole(units), plain,
        steps, threads(), scores.reshape(b * h, g, number),
    )  # fmt: skip
    return torch.from_numpy(scores)


@register("attend_units", "cpu", rank=10, fits=fits)
def attend_units(
    q: Tensor, held: Tensor, table: Any, room: np.ndarray, scale: float, *,
    unit: int, heads: str, sinks: int, recent: int, mass: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not _reads_units(q, held, table, mass):
        return naive.attend_units(
            q, held, table, room, scale, unit=unit, heads=heads, sinks=sinks, recent=recent, mass=mass
        )
    from kvfold.ops import _cpu

    (b, h, g, d), pool = q.shape, table.pool
    out, lse = _answer(q, pool)
    _cpu.attend_units(
        floats(q).reshape(b * h, g, d), bits(held).reshape(b * h, *held.shape[2:]), room.repeat(h), heads, sinks,
        recent, pool.array("keys"), pool.array("values"), None if mass is None else pool.array(mass), table.table,
        table.lengths, pool.page_size, unit // pool.page_size, scale, threads(), out.reshape(b * h, g, -1),
        lse.reshape(b * h, g),
    )  # fmt: skip
    return _of(q, out), torch.from_numpy(lse)


@register("step_units", "cpu", rank=10, fits=fits)
def step_units(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], held: Tensor, room: np.ndarray, scale: float, *,
    unit: int, heads: str, sinks: int, recent: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    pool, keys, values = table.pool, planes["keys"], planes["values"]
    known = keys.dtype == pool.specs["keys"].dtype and values.dtype == pool.specs["values"].dtype
    if not known or not _rises(held, keys) or not _reads_units(q, held, table, None):
        return naive.step_units(q, table, planes, held, room, scale, unit=unit, heads=heads, sinks=sinks, recent=recent)
    from kvfold.ops import _cpu

    b, h, g, d = q.shape
    out, lse = _answer(q, pool)
    table.extend(1)
    pool = table.pool  # which may be another one now
    _cpu.step_units(
        floats(q).reshape(b * h, g, d), bits(keys), bits(values), _places(planes),
        bits(held).reshape(b * h, *held.shape[2:]), room.repeat(h), heads, sinks, recent, pool.array("keys"),
        pool.array("values"), pool.array("position"), table.table, table.lengths, pool.page_size,
        unit // pool.page_size, scale, threads(), out.reshape(b * h, g, -1), lse.reshape(b * h, g),
    )  # fmt: skip
    return _of(q, out), torch.from_numpy(lse)


def steps_keys(q: Tensor, table: Any, by: Any) -> bool:
    """Whether the kernel of `step_keys` takes such queries and tokens; else a step is better done part by part."""
    pairs = pairs_of(by.rope) if fits(q) else None
    if pairs is None or not widths_fit(len(pairs.angles), pairs.first) or by.heads == "each":
        return False
    here = by.held.dtype == torch.bfloat16 and q.dtype != torch.float16
    return here and q.dtype == table.pool.specs["keys"].dtype and _reads_units(q, by.held, table, None)


@register("step_keys", "cpu", rank=10, fits=fits)
def step_keys(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], by: Any, seen: np.ndarray, scale: float
) -> tuple[Tensor, Tensor]:
    pool, keys, values, pairs = table.pool, planes["keys"], planes["values"], pairs_of(by.rope)
    known = keys.dtype == pool.specs["keys"].dtype and values.dtype == pool.specs["values"].dtype
    if pairs is None or not (known and steps_keys(q, table, by)):
        return naive.step_keys(q, table, planes, by, seen, scale)
    from kvfold.ops import _cpu

    b, h, g, d = q.shape
    out, lse = _answer(q, pool)
    table.extend(1)
    pool = table.pool  # which may be another one now
    _cpu.step_keys(
        floats(q).reshape(b * h, g, d), q.dtype == torch.bfloat16, bits(keys), bits(values), _places(planes),
        bits(by.held).reshape(b * h, *by.held.shape[2:]), by.steps, by.distance, _whole(seen), _whole(by.room),
        _whole(by.first), _whole(by.before), by.chooses, by.heads, by.layer, by.scale, by.slots, pairs.angles,
        pairs.first, pairs.neighbours, pool.array("keys"), pool.array("values"), pool.array("position"), table.table,
        table.lengths, pool.page_size, scale, threads(), out.reshape(b * h, g, -1), lse.reshape(b * h, g),
    )  # fmt: skip
    return _of(q, out), torch.from_numpy(lse)


def _places(planes: Mapping[str, Tensor]) -> np.ndarray:
    """Where one token of each row stands, (R, 1, 1)."""
    return np.ascontiguousarray(planes["position"].numpy(), dtype=np.int32)[..., None]


def _reads_units(q: Tensor, held: Tensor, table: Any, mass: str | None) -> bool:
    """Whether the kernels that read units at once can read these."""
    pool, fits_here = table.pool, held.dtype in FLOATS and held.is_contiguous() and table.pool.memory is None
    return fits_here and pool.page_size > 1 and reads_pages(pool, q.shape[2], q.shape[3], mass)


def _answer(q: Tensor, pool: Any) -> tuple[np.ndarray, np.ndarray]:
    """Room for (out, lse)."""
    lse = np.empty(q.shape[:3], dtype=np.float32)
    return np.empty((*lse.shape, pool.specs["values"].width), dtype=np.float32), lse


def _of(q: Tensor, out: np.ndarray) -> Tensor:
    """What a query gets, in its dtype."""
    answer = torch.from_numpy(out)
    return answer if q.dtype == torch.float32 else answer.to(q.dtype)


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


@register("vote_units", "cpu", rank=10, fits=is_float32)
def vote_units(
    scores: Tensor, units: np.ndarray, room: np.ndarray, first: np.ndarray, before: np.ndarray, *,
    heads: str, scale: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    if not scores.shape[1]:
        return naive.vote_units(scores, units, room, first, before, heads=heads, scale=scale)
    from kvfold.ops import _cpu

    able = np.minimum(units, room)
    numbers = np.empty((len(able), int(able.max(initial=0))), dtype=np.int32)
    counts = np.empty(len(able), dtype=np.int32)
    _cpu.vote_units(
        floats(scores.detach()), _whole(units), _whole(able), _whole(first), _whole(before), heads, scale, threads(),
        numbers, counts,
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
