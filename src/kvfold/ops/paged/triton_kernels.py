"""Attention, append and gather over pages in Triton: raw tensors, no page table object, no wait for the device.

A row is one (sequence, KV head). Token `slot` of row r lies in every plane (N, P, ...) at page
`table[r, slot // P]`, offset `slot % P`. Grids and buffers depend on shapes alone, never on `lengths`, so that a
CUDA graph can replay a step while rows grow. Triton is optional: nothing imports this module before it is asked for.
"""

# `no_type_check` keeps jaxtyping's import hook (under pytest) away from the kernels: it would put a wrapper between
# `triton.jit` and the function whose source it compiles.

import math
from collections.abc import Mapping
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8, Int32, Shaped
from torch import Tensor

from kvfold.ops.triton_rows import (
    OPTIONS,
    added,
    attend_rows,
    block_of,
    counted,
    left,
    queries,
    scored,
    share,
    walk,
)  # fmt: skip

STAGE_BYTES = 1 << 15
"""Keys and values that one step of the loop loads; two steps are under way, and three programs fit in an H200's SM."""


def attend(
    q: Float[Tensor, "R G D"],
    keys: Float[Tensor, "N P D"],
    values: Float[Tensor, "N P Dv"],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    scale: float,
    *,
    mass: Float32[Tensor, "N P"] | None = None,
    dropped: Int8[Tensor, "R _"] | None = None,
    splits: int | None = None,
    probabilities: bool = False,
) -> tuple[Float[Tensor, "R G Dv"], Float32[Tensor, "R G"], Float32[Tensor, "R G S"] | None]:
    """(out, lse, probabilities or None) over `keys` and `values`; see `kvfold.ops.triton_rows.attend_rows`."""
    (page, dv), block_d, block_dv = values.shape[1:], block_of(q.shape[2]), block_of(values.shape[2])
    assert max(q.shape[2], dv) <= 256, f"D={q.shape[2]} and Dv={dv} must be at most 256"
    # float32 has no matrix unit: its products live in registers, and a tile of full size would spill.
    block_t = STAGE_BYTES // (block_d + block_dv) // (8 if q.dtype == torch.float32 else 2)
    block_t = min(64, max(16, 1 << block_t.bit_length() - 1))
    constants = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "num_warps": 4, "num_stages": 5}
    return attend_rows(
        _attend_split, q, (keys, values), table, lengths, scale, page=page, dv=dv, mass=mass, splits=splits,
        dropped=dropped, probabilities=probabilities, constants=constants,
    )  # fmt: skip


def append(
    planes: Mapping[str, Shaped[Tensor, "N P ..."]],
    new: Mapping[str, Shaped[Tensor, "R ..."]],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    *,
    fills: Mapping[str, float] | None = None,
) -> None:
    """Write one token per row at slot `lengths[r]`, all planes in one launch, and add 1 to `lengths`, in place.

    A plane that `new` lacks gets its value of `fills`. A row whose table has no page for the slot stays as it is.
    The page must be the row's own: whoever shares pages copies them first.
    """
    assert set(new) <= set(planes), f"new={sorted(new)} must name planes={sorted(planes)}"
    assert all(x.is_contiguous() for x in (*planes.values(), table, lengths))
    given = {name: x.contiguous() for name, x in new.items()}
    widths = tuple(_width(plane) for plane in planes.values())
    with torch.cuda.device(lengths.get_device()):
        _append[(table.shape[0],)](
            tuple(planes.values()), tuple(given.get(name, lengths) for name in planes),
            tuple(0.0 if name in new else float((fills or {})[name]) for name in planes),
            table, lengths, table.shape[1],
            GIVEN=tuple(name in new for name in planes), WIDTHS=widths, BLOCKS=_blocks(widths), PAGE=_page(planes),
            num_warps=1, **OPTIONS,  # two warps: one could count before the other has read the count
        )  # fmt: skip


def gather(
    source_planes: Mapping[str, Shaped[Tensor, "N P ..."]],
    source_table: Int32[Tensor, "R M"],
    slots: Int32[Tensor, "R n"],
    counts: Int32[Tensor, " R"],
    target_planes: Mapping[str, Shaped[Tensor, "N2 P ..."]],
    target_table: Int32[Tensor, "R M2"],
) -> None:
    """Token i < `counts[r]` of row r in the target becomes token `slots[r, i]` of the source, all planes in one launch.

    The pools are two: a token may be read after its slot would have been written. Every target plane is written.
    """
    assert all(x.is_contiguous() for x in (*source_planes.values(), *target_planes.values()))
    assert all(x.is_contiguous() for x in (source_table, slots, counts, target_table))
    widths = tuple(_width(plane) for plane in target_planes.values())
    (rows, n), block = slots.shape, 32
    with torch.cuda.device(slots.get_device()):
        _gather[rows, triton.cdiv(n, block)](
            tuple(source_planes[name] for name in target_planes), source_table, slots, counts,
            tuple(target_planes.values()), target_table, n, source_table.shape[1], target_table.shape[1],
            WIDTHS=widths, BLOCKS=_blocks(widths), PAGE=_page(source_planes), BLOCK_T=block, **OPTIONS,
        )  # fmt: skip


def _width(plane: Tensor) -> int:
    return math.prod(plane.shape[2:])


def _blocks(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(triton.next_power_of_2(width)) for width in widths)


def _page(planes: Mapping[str, Tensor]) -> int:
    (size,) = {plane.shape[1] for plane in planes.values()}
    return size


@triton.jit(do_not_specialize=["groups", "width", "dropped_width"])
@no_type_check
def _attend_split(
    q, planes, table, lengths, mass, dropped, out, lse, logits, scale, groups, width, dropped_width,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row, d, dv = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    g, query = queries(q, row, groups, D, BLOCK_G, BLOCK_D)
    first, last = share(lengths, row, PAGE, PAGE, BLOCK_T)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for start in range(first, last, BLOCK_T):
        slot, token, here = walk(table, row, width, start, last, PAGE, PAGE, BLOCK_T)
        seen = counted(dropped, row, dropped_width, slot, here)
        key = tl.load(planes[0] + token[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        value = tl.load(
            planes[1] + token[:, None] * DV + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0
        )
        product = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee")
        logit = scored(product, scale, mass, logits, row, groups, g, width * PAGE, slot, token, here, seen)
        best, total, acc = added(logit, value.to(query.dtype), best, total, acc, True)
    left(out, lse, row, groups, g, best, total, acc, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["width"])
@no_type_check
def _append(
    planes, new, fills, table, lengths, width,
    GIVEN: tl.constexpr, WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(lengths + row)
    page = tl.load(table + row * width + slot // PAGE, mask=slot < width * PAGE, other=-1)
    token = page.to(tl.int64) * PAGE + slot % PAGE
    for i in tl.static_range(len(WIDTHS)):
        n = tl.arange(0, BLOCKS[i])
        mask = n < tl.where(page >= 0, WIDTHS[i], 0)
        place = planes[i] + token * WIDTHS[i] + n
        if GIVEN[i]:
            tl.store(place, tl.load(new[i] + row * WIDTHS[i] + n, mask=mask).to(planes[i].dtype.element_ty), mask=mask)
        else:
            fill = tl.zeros([BLOCKS[i]], tl.float32) + fills[i]
            tl.store(place, fill.to(planes[i].dtype.element_ty), mask=mask)
    tl.store(lengths + row, slot + 1, mask=page >= 0)


@triton.jit(do_not_specialize=["n", "source_width", "target_width"])
@no_type_check
def _gather(
    source, source_table, slots, counts, target, target_table, n, source_width, target_width,
    WIDTHS: tl.constexpr, BLOCKS: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = i < tl.minimum(tl.load(counts + row), n)
    slot = tl.load(slots + row * n + i, mask=mine, other=0)
    page = tl.load(source_table + row * source_width + slot // PAGE, mask=mine, other=-1)
    to_page = tl.load(target_table + row * target_width + i // PAGE, mask=mine & (i < target_width * PAGE), other=-1)
    here = (page >= 0) & (to_page >= 0)
    token = page.to(tl.int64) * PAGE + slot % PAGE
    to_token = to_page.to(tl.int64) * PAGE + i % PAGE
    for p in tl.static_range(len(WIDTHS)):
        w = tl.arange(0, BLOCKS[p])
        mask = here[:, None] & (w < WIDTHS[p])[None, :]
        moved = tl.load(source[p] + token[:, None] * WIDTHS[p] + w[None, :], mask=mask)
        place = target[p] + to_token[:, None] * WIDTHS[p] + w[None, :]
        tl.store(place, moved.to(target[p].dtype.element_ty), mask=mask)
