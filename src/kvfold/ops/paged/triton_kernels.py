"""Attention, append and gather over pages in Triton: raw tensors, no page table object, no wait for the device.

A row is one (sequence, KV head). Token `slot` of row r lies in every plane (N, P, ...) at page
`table[r, slot // P]`, offset `slot % P`. Grids and buffers depend on shapes alone, never on `lengths`, so that a
CUDA graph can replay a step while rows grow. Triton is optional: nothing imports this module before it is asked for.
"""

# `no_type_check` keeps jaxtyping's import hook (under pytest) away from the kernels: it would put a wrapper between
# `triton.jit` and the function whose source it compiles.

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int32, Shaped
from torch import Tensor

STAGE_BYTES = 1 << 15
"""Keys and values that one step of the loop loads; two steps are under way, and three programs fit in an H200's SM."""

SPLIT_TOKENS = 256
"""A split shorter than this spends its time on filling its pipeline."""

OPTIONS = {"enable_fp_fusion": True}
"""Triton's default is about to change, and says so with a warning."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def attend(
    q: Float[Tensor, "R G D"],
    keys: Float[Tensor, "N P D"],
    values: Float[Tensor, "N P Dv"],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    scale: float,
    *,
    mass: Float32[Tensor, "N P"] | None = None,
    holes: Int32[Tensor, "R K"] | None = None,
    hole_count: Int32[Tensor, " R"] | None = None,
    splits: int | None = None,
    probabilities: bool = False,
) -> tuple[Float[Tensor, "R G Dv"], Float32[Tensor, "R G"], Float32[Tensor, "R G S"] | None]:
    """(out, lse, probabilities or None): each row's G queries over its tokens, which are read once for all of them.

    `mass` is added to the logits. `holes[r, :hole_count[r]]` are slots that do not count; what they hold must be
    finite. Slots past a row's length, and pages that no row holds, may hold anything. A row without tokens gives 0 and
    -inf. Probabilities are (R, G, M * P), 0 where no token is. `splits` programs share each row evenly.
    """
    (rows, groups, d), (page, dv), width = q.shape, values.shape[1:], table.shape[1]
    assert max(d, dv) <= 256, f"D={d} and Dv={dv} must be at most 256"
    assert (holes is None) == (hole_count is None), "holes and hole_count go together"
    assert all(x is None or x.is_contiguous() for x in (keys, values, table, lengths, mass, holes, hole_count))
    capacity = width * page
    block_g = min(64, max(16, triton.next_power_of_2(groups)))  # a matrix unit's tile has 16 rows
    tiles = triton.cdiv(groups, block_g)
    splits = splits or choose_splits(rows * tiles, capacity, _cores(q.device))
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (d, dv))
    # float32 has no matrix unit: its products live in registers, and a tile of full size would spill.
    block_t = STAGE_BYTES // (block_d + block_dv) // (8 if q.dtype == torch.float32 else 2)
    block_t = min(64, max(16, 1 << block_t.bit_length() - 1))

    out = q.new_empty(rows, groups, dv)
    lse = q.new_empty(rows, groups, dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty(rows, splits, groups, dv, dtype=torch.float32)
        part_lse = q.new_empty(rows, splits, groups, dtype=torch.float32)
    logits = q.new_empty(rows, groups, capacity, dtype=torch.float32) if probabilities else None
    with torch.cuda.device(q.get_device()):
        dropped = None
        if holes is not None and holes.shape[1]:
            dropped = torch.zeros(rows, capacity, dtype=torch.int8, device=q.device)
            grid = (rows, triton.cdiv(holes.shape[1], 128))
            _mark_holes[grid](holes, hole_count, dropped, holes.shape[1], capacity, BLOCK=128, **OPTIONS)
        _attend_split[rows, splits, tiles](
            q.contiguous(), keys, values, table, lengths, mass, dropped, parts, part_lse, logits, scale, groups, width,
            D=d, DV=dv, PAGE=page, BLOCK_G=block_g, BLOCK_T=block_t,
            BLOCK_D=block_d, BLOCK_DV=block_dv, num_warps=4, num_stages=5, **OPTIONS,
        )  # fmt: skip
        if splits > 1:
            _combine[rows, groups](
                parts, part_lse, out, lse, splits, groups,
                DV=dv, BLOCK_DV=block_dv, BLOCK_S=triton.next_power_of_2(splits), CHUNK=16, num_warps=4, **OPTIONS,
            )  # fmt: skip
        if logits is not None:
            _normalise[rows * groups, triton.cdiv(capacity, 1024)](
                logits, lse, lengths, groups, capacity, BLOCK=1024, **OPTIONS
            )
    return out, lse, logits


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


@lru_cache(maxsize=256)
def choose_splits(programs: int, capacity: int, cores: int) -> int:
    """How many programs share a row: at least two rounds over all cores where `capacity` tokens allow it, then the
    fewest that leave nearly no core idle in the last round (as FlashAttention chooses, without looking at lengths).
    """
    limit, slots = max(1, min(128, triton.cdiv(capacity, SPLIT_TOKENS))), 2 * cores
    first = min(limit, max(1, triton.cdiv(2 * slots, max(1, programs))))
    busy = {n: n * programs / (triton.cdiv(max(1, n * programs), slots) * slots) for n in range(first, limit + 1)}
    return next(n for n, share in busy.items() if share >= 0.95 * max(busy.values()))


def _cores(device: torch.device) -> int:
    # Only the interpreter runs elsewhere than on CUDA: one program at a time.
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _width(plane: Tensor) -> int:
    return math.prod(plane.shape[2:])


def _blocks(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(triton.next_power_of_2(width)) for width in widths)


def _page(planes: Mapping[str, Tensor]) -> int:
    (size,) = {plane.shape[1] for plane in planes.values()}
    return size


@triton.jit(do_not_specialize=["hole_width", "capacity"])
@no_type_check
def _mark_holes(holes, hole_count, dropped, hole_width, capacity, BLOCK: tl.constexpr):
    # A byte for each slot, written once: a loop over the holes inside the loop over tokens would end its pipelining.
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(holes + row * hole_width + i, mask=i < tl.load(hole_count + row), other=-1)
    tl.store(dropped + row * capacity + slot, 1, mask=(slot >= 0) & (slot < capacity))


@triton.jit(do_not_specialize=["groups", "width"])
@no_type_check
def _attend_split(
    q, keys, values, table, lengths, mass, dropped, out, lse, logits, scale, groups, width,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query = tl.load(
        q + (row * groups + g)[:, None] * D + d[None, :], mask=(g < groups)[:, None] & (d < D)[None, :], other=0.0
    )
    # The row's length, read here, sets the share: splits are even however much wider the table is.
    length = tl.load(lengths + row)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_T) * BLOCK_T
    first = split * share
    last = tl.minimum(first + share, length)

    best = tl.full([BLOCK_G], float("-inf"), tl.float32)  # in units of log 2, as all logits here
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for start in range(first, last, BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)
        page = tl.load(table + row * width + slot // PAGE, mask=slot < last, other=-1)
        here = page >= 0
        token = page.to(tl.int64) * PAGE + slot % PAGE
        key = tl.load(keys + token[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        value = tl.load(values + token[:, None] * DV + dv[None, :], mask=here[:, None] & (dv < DV)[None, :], other=0.0)
        logit = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * (scale * LOG2E)
        if mass is not None:
            logit += (tl.load(mass + token, mask=here, other=0.0) * LOG2E)[None, :]
        seen = here
        if dropped is not None:
            # Not part of the masks above: keys and values would wait for one more load.
            gone = tl.load(dropped + row * width * PAGE + slot, mask=slot < last, other=1)
            seen = here & (gone == 0)
        logit = tl.where(seen[None, :], logit, float("-inf"))
        if logits is not None:
            place = (row * groups + g)[:, None] * (width * PAGE) + slot[None, :]
            tl.store(logits + place, logit, mask=(g < groups)[:, None] & (slot < last)[None, :])
        top = tl.maximum(best, tl.max(logit, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(logit - shift[:, None])
        old = tl.exp2(best - shift)
        total = total * old + tl.sum(weight, 1)
        acc = tl.dot(weight.to(query.dtype), value.to(query.dtype), acc * old[:, None], input_precision="ieee")
        best = top

    safe = tl.where(total > 0.0, total, 1.0)  # nothing seen: acc is 0 and best is -inf
    place = (row * splits + split) * groups + g
    tl.store(lse + place, (best + tl.log2(safe)) * LN2, mask=g < groups)
    tl.store(
        out + place[:, None] * DV + dv[None, :],
        (acc / safe[:, None]).to(out.dtype.element_ty),
        mask=(g < groups)[:, None] & (dv < DV)[None, :],
    )


@triton.jit(do_not_specialize=["splits", "groups"])
@no_type_check
def _combine(
    parts, part_lse, out, lse, splits, groups,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, g, dv = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_S)
    each = tl.load(part_lse + (row * splits + s) * groups + g, mask=s < splits, other=float("-inf"))
    best = tl.max(each, 0)
    shift = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp(each - shift), 0)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, splits, CHUNK):  # 128 splits of 256 numbers would not fit in registers
        s = start + tl.arange(0, CHUNK)
        place = (row * splits + s) * groups + g
        weight = tl.exp(tl.load(part_lse + place, mask=s < splits, other=float("-inf")) - shift)
        part = tl.load(
            parts + place[:, None] * DV + dv[None, :], mask=(s < splits)[:, None] & (dv < DV)[None, :], other=0.0
        )
        acc += tl.sum(part * weight[:, None], 0)
    safe = tl.where(total > 0.0, total, 1.0)
    tl.store(lse + row * groups + g, best + tl.log(safe))
    tl.store(out + (row * groups + g) * DV + dv, (acc / safe).to(out.dtype.element_ty), mask=dv < DV)


@triton.jit(do_not_specialize=["groups", "capacity"])
@no_type_check
def _normalise(logits, lse, lengths, groups, capacity, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # one for each query
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shift = tl.load(lse + row) * LOG2E
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    # Past the length nothing was written.
    logit = tl.load(logits + row * capacity + slot, mask=slot < tl.load(lengths + row // groups), other=float("-inf"))
    tl.store(logits + row * capacity + slot, tl.exp2(logit - shift), mask=slot < capacity)


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
