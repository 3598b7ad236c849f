"""Attention over numbers of eight bits (float8_e4m3fn) in Triton, a scale for each token's key and one for its value.

Bytes become float32 by shifts, on GPUs that have no such type too. Triton is optional: nothing imports this module
before it is asked for.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8, Int32, UInt8
from torch import Tensor

from kvfold.ops.triton_rows import PRECISION, added, attend_rows, block_of, counted, left, queries, scored, share, walk

TILE = 32
"""Tokens of a tile: keys and values become float32, which must find room in registers."""


def attend(
    q: Float[Tensor, "R G D"],
    keys: tuple[UInt8[Tensor, "N P D"], Float32[Tensor, "N P"]],
    values: tuple[UInt8[Tensor, "N P Dv"], Float32[Tensor, "N P"]],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    scale: float,
    *,
    mass: Float32[Tensor, "N P"] | None = None,
    dropped: Int8[Tensor, "R _"] | None = None,
    splits: int | None = None,
    probabilities: bool = False,
) -> tuple[Float[Tensor, "R G Dv"], Float32[Tensor, "R G"], Float32[Tensor, "R G S"] | None]:
    """(out, lse, probabilities or None) over bytes and scales; see `kvfold.ops.triton_rows.attend_rows`."""
    (page, dv), blocks = values[0].shape[1:], [block_of(x[0].shape[2]) for x in (keys, values)]
    constants = {"BLOCK_T": TILE, "BLOCK_D": blocks[0], "BLOCK_DV": blocks[1], "num_warps": 4, "num_stages": 3}
    return attend_rows(
        _attend_float8, q, (*keys, *values), table, lengths, scale, page=page, dv=dv, mass=mass, dropped=dropped,
        splits=splits, probabilities=probabilities, constants=constants,
    )  # fmt: skip


# `no_type_check`: see kvfold.ops.triton_rows.
@triton.jit
@no_type_check
def widened(plane, scale, token, here, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of tokens, (T, BLOCK), float32: a byte's sign, 4 bits of exponent (bias 7), 3 of the fraction."""
    d = tl.arange(0, BLOCK)
    byte = tl.load(plane + token[:, None] * SIZE + d[None, :], mask=here[:, None] & (d < SIZE)[None, :], other=0)
    wide = byte.to(tl.int16)
    # As float16 (bias 15) it is the 256th part, however small.
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    number = tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return number * tl.load(scale + token, mask=here, other=0.0)[:, None]


@triton.jit(do_not_specialize=["groups", "width", "dropped_width"])
@no_type_check
def _attend_float8(
    q, planes, table, lengths, mass, dropped, out, lse, logits, scale, groups, width, dropped_width,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    g, query = queries(q, row, groups, D, BLOCK_G, BLOCK_D)
    first, last = share(lengths, row, PAGE, PAGE, BLOCK_T)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for start in range(first, last, BLOCK_T):
        slot, token, here = walk(table, row, width, start, last, PAGE, PAGE, BLOCK_T)
        seen = counted(dropped, row, dropped_width, slot, here)
        key = widened(planes[0], planes[1], token, seen, D, BLOCK_D)
        value = widened(planes[2], planes[3], token, seen, DV, BLOCK_DV)
        product = tl.dot(query.to(tl.float32), tl.trans(key), input_precision=PRECISION)
        logit = scored(product, scale, mass, logits, row, groups, g, width * PAGE, slot, token, here, seen)
        best, total, acc = added(logit, value, best, total, acc, False)
    left(out, lse, row, groups, g, best, total, acc, DV, BLOCK_DV)
