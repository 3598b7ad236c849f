"""What attention kernels over pages share in Triton: a walk over a row's pages, the softmax as it goes, and the merge.

A row is one (sequence, KV head). Token `slot` of row r lies in every plane (N, P, ...) at page
`table[r, slot // P]`, offset `slot % P`. Programs are (row, split, tile of queries): each walks over its share of the
row's tokens, which it reads once for all queries of its tile, and leaves an answer and its log-sum-exp. Grids and
buffers depend on shapes alone, never on `lengths`. Logits are in units of log 2 throughout.
Triton is optional: nothing imports this module before it is asked for.
"""

# `no_type_check` keeps jaxtyping's import hook (under pytest) away from the kernels: it would put a wrapper between
# `triton.jit` and the function whose source it compiles.

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Float32, Int8, Int32
from torch import Tensor

SPLIT_TOKENS = 256
"""A split shorter than this spends its time on filling its pipeline."""

OPTIONS = {"enable_fp_fusion": True}
"""Triton's default is about to change, and says so with a warning."""

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

PRECISION = tl.constexpr("tf32x3")
"""Of products of numbers that were codes: matrix units take them in three parts, which is float32 but for its end."""


def attend_rows(
    kernel: Any,
    q: Float[Tensor, "R G D"],
    planes: tuple[Tensor | None, ...],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    scale: float,
    *,
    page: int,
    dv: int,
    mass: Float[Tensor, "N P"] | None = None,
    dropped: Int8[Tensor, "R _"] | None = None,
    splits: int | None = None,
    probabilities: bool = False,
    constants: Mapping[str, Any],
) -> tuple[Float[Tensor, "R G Dv"], Float32[Tensor, "R G"], Float32[Tensor, "R G S"] | None]:
    """(out, lse, probabilities or None): each row's G queries over its tokens, by a `kernel` over `planes`.

    `mass` is added to the logits; slots with a 1 in `dropped` (see `left_out`) do not count. What those hold, and slots
    past a row's length, and pages that no row holds, may be anything. A row without tokens gives 0 and -inf.
    Probabilities are (R, G, M * P), 0 where no token is. `splits` programs share each row evenly. `constants` are the
    kernel's own, and Triton's options.
    """
    (rows, groups, d), capacity = q.shape, table.shape[1] * page
    assert all(x is None or x.is_contiguous() for x in (*planes, table, lengths, mass, dropped))
    block_g = min(64, max(16, triton.next_power_of_2(groups)))  # a matrix unit's tile has 16 rows
    tiles = triton.cdiv(groups, block_g)
    splits = splits or choose_splits(rows * tiles, capacity, _cores(q.device))

    out = q.new_empty(rows, groups, dv)
    lse = q.new_empty(rows, groups, dtype=torch.float32)
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty(rows, splits, groups, dv, dtype=torch.float32)
        part_lse = q.new_empty(rows, splits, groups, dtype=torch.float32)
    logits = q.new_empty(rows, groups, capacity, dtype=torch.float32) if probabilities else None
    with torch.cuda.device(q.get_device()):
        kernel[rows, splits, tiles](
            q.contiguous(), planes, table, lengths, mass, dropped, parts, part_lse, logits, scale, groups,
            table.shape[1], 0 if dropped is None else dropped.shape[1],
            D=d, DV=dv, PAGE=page, BLOCK_G=block_g, **constants, **OPTIONS,
        )  # fmt: skip
        if splits > 1:
            _combine[rows, groups](
                parts, part_lse, out, lse, splits, groups,
                DV=dv, BLOCK_DV=block_of(dv), BLOCK_S=triton.next_power_of_2(splits), CHUNK=16, num_warps=4, **OPTIONS,
            )  # fmt: skip
        if logits is not None:
            _normalise[rows * groups, triton.cdiv(capacity, 1024)](
                logits, lse, lengths, groups, capacity, BLOCK=1024, **OPTIONS
            )
    return out, lse, logits


def left_out(
    capacity: int,
    holes: Int32[Tensor, "R K"] | None,
    hole_count: Int32[Tensor, " R"] | None,
    read: Bool[Tensor, "R T"] | None = None,
) -> Int8[Tensor, "R _"] | None:
    """A byte for each slot, 1 for those that do not count: `holes[r, :hole_count[r]]`, and those that are not `read`.

    None where all count. A loop over the holes inside the loop over tokens would end its pipelining.
    """
    assert (holes is None) == (hole_count is None), "holes and hole_count go together"
    dropped = None if read is None else (~read).to(torch.int8)
    if holes is None or hole_count is None or not holes.shape[1]:
        return dropped
    if dropped is None:
        dropped = torch.zeros(len(holes), capacity, dtype=torch.int8, device=holes.device)
    grid = (len(holes), triton.cdiv(holes.shape[1], 128))
    with torch.cuda.device(holes.get_device()):
        _mark_holes[grid](holes, hole_count, dropped, holes.shape[1], dropped.shape[1], BLOCK=128, **OPTIONS)
    return dropped


@lru_cache(maxsize=256)
def choose_splits(programs: int, capacity: int, cores: int) -> int:
    """How many programs share a row: at least two rounds over all cores where `capacity` tokens allow it, then the
    fewest that leave nearly no core idle in the last round (as FlashAttention chooses, without looking at lengths).
    """
    limit, slots = max(1, min(128, triton.cdiv(capacity, SPLIT_TOKENS))), 2 * cores
    first = min(limit, max(1, triton.cdiv(2 * slots, max(1, programs))))
    busy = {n: n * programs / (triton.cdiv(max(1, n * programs), slots) * slots) for n in range(first, limit + 1)}
    return next(n for n, share in busy.items() if share >= 0.95 * max(busy.values()))


def block_of(width: int) -> int:
    """The tile that takes vectors of so many numbers."""
    return max(16, int(triton.next_power_of_2(width)))


def _cores(device: torch.device) -> int:
    # Only the interpreter runs elsewhere than on CUDA: one program at a time.
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@triton.jit
@no_type_check
def queries(q, row, groups, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which queries of the row are this program's (BLOCK_G,), and what they are (BLOCK_G, BLOCK_D)."""
    g, d = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    places = q + (row * groups + g)[:, None] * D + d[None, :]
    return g, tl.load(places, mask=(g < groups)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
@no_type_check
def share(lengths, row, PAGE: tl.constexpr, ROOM: tl.constexpr, BLOCK_T: tl.constexpr):
    """From where to where this program walks: places, of which each page takes `ROOM`, `PAGE` of them slots.

    The row's length, read here, sets the share: splits are even however much wider the table is.
    """
    split, splits, length = tl.program_id(1), tl.num_programs(1), tl.load(lengths + row)
    places = length // PAGE * ROOM + length % PAGE
    each = tl.cdiv(tl.cdiv(places, splits), BLOCK_T) * BLOCK_T
    first = split * each
    return first, tl.minimum(first + each, places)


@triton.jit
@no_type_check
def walk(table, row, width, start, last, PAGE: tl.constexpr, ROOM: tl.constexpr, BLOCK_T: tl.constexpr):
    """Slots of a tile of places (past the row's last where there is none), their tokens in planes, and if those are."""
    place = start + tl.arange(0, BLOCK_T)
    index, offset = place // ROOM, place % ROOM
    inside = (place < last) & (offset < PAGE)
    page = tl.load(table + row * width + index, mask=inside, other=-1)
    return tl.where(inside, index * PAGE + offset, width * PAGE), page.to(tl.int64) * PAGE + offset, page >= 0


@triton.jit
@no_type_check
def counted(dropped, row, dropped_width, slot, here):
    """Those of the slots that are here which are not left out: of the others nothing is read."""
    if dropped is not None:
        here = here & (tl.load(dropped + row * dropped_width + slot, mask=here, other=1) == 0)
    return here


@triton.jit
@no_type_check
def scored(product, scale, mass, logits, row, groups, g, capacity, slot, token, here, seen):
    """Logits of products (BLOCK_G, BLOCK_T) with keys, -inf where a slot is not seen; left in `logits` too if asked."""
    logit = product * (scale * LOG2E)
    if mass is not None:
        logit += (tl.load(mass + token, mask=here, other=0.0) * LOG2E)[None, :]
    logit = tl.where(seen[None, :], logit, float("-inf"))
    if logits is not None:
        place = (row * groups + g)[:, None] * capacity + slot[None, :]
        tl.store(logits + place, logit, mask=(g < groups)[:, None] & (slot < capacity)[None, :])
    return logit


@triton.jit
@no_type_check
def added(logit, value, best, total, acc, EXACT: tl.constexpr):
    """The softmax so far (its largest logit, its sum, its values) with a tile more, of the dtype of `value`."""
    top = tl.maximum(best, tl.max(logit, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(logit - shift[:, None])
    old = tl.exp2(best - shift)
    acc = tl.dot(weight.to(value.dtype), value, acc * old[:, None], input_precision="ieee" if EXACT else PRECISION)
    return top, total * old + tl.sum(weight, 1), acc


@triton.jit
@no_type_check
def left(out, lse, row, groups, g, best, total, acc, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Write this split's answer and its log-sum-exp."""
    dv, safe = tl.arange(0, BLOCK_DV), tl.where(total > 0.0, total, 1.0)  # nothing seen: acc is 0 and best is -inf
    place = (row * tl.num_programs(1) + tl.program_id(1)) * groups + g
    tl.store(lse + place, (best + tl.log2(safe)) * LN2, mask=g < groups)
    tl.store(
        out + place[:, None] * DV + dv[None, :],
        (acc / safe[:, None]).to(out.dtype.element_ty),
        mask=(g < groups)[:, None] & (dv < DV)[None, :],
    )


@triton.jit(do_not_specialize=["hole_width", "capacity"])
@no_type_check
def _mark_holes(holes, hole_count, dropped, hole_width, capacity, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(holes + row * hole_width + i, mask=i < tl.load(hole_count + row), other=-1)
    tl.store(dropped + row * capacity + slot, 1, mask=(slot >= 0) & (slot < capacity))


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
