"""Attention over vectors of which some numbers are kept, in Triton: bitmaps say where those stand.

Kept numbers and bitmaps are read as they are stored; a number's place among those of its vector is how many bits are
set before its own. Triton is optional: nothing imports this module before it is asked for.
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
    keys: tuple[Float[Tensor, "N P K"], UInt8[Tensor, "N P W"]],
    values: tuple[Float[Tensor, "N P L"], UInt8[Tensor, "N P V"]],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    scale: float,
    *,
    value_size: int,
    mass: Float32[Tensor, "N P"] | None = None,
    dropped: Int8[Tensor, "R _"] | None = None,
    splits: int | None = None,
    probabilities: bool = False,
) -> tuple[Float[Tensor, "R G Dv"], Float32[Tensor, "R G"], Float32[Tensor, "R G S"] | None]:
    """(out, lse, probabilities or None) over `keys` and `values`: kept numbers, and bitmaps of their channels.

    Otherwise as `kvfold.ops.triton_rows.attend_rows` has it.
    """
    constants = {
        "KEPT": keys[0].shape[-1], "VALUE_KEPT": values[0].shape[-1], "BLOCK_T": TILE,
        "BLOCK_D": block_of(q.shape[2]), "BLOCK_DV": block_of(value_size), "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    return attend_rows(
        _attend_sparse, q, (*keys, *values), table, lengths, scale, page=keys[0].shape[1], dv=value_size, mass=mass,
        dropped=dropped, splits=splits, probabilities=probabilities, constants=constants,
    )  # fmt: skip


# `no_type_check`: see kvfold.ops.triton_rows.
@triton.jit
@no_type_check
def whole(kept, maps, token, here, SIZE: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors of tokens, (T, BLOCK), float32: what is kept of them, and zeros."""
    BYTES: tl.constexpr = (SIZE + 7) // 8
    b, i = tl.arange(0, BLOCK // 8), tl.arange(0, 8)
    inside = here[:, None] & (b < BYTES)[None, :]
    byte = tl.load(maps + token[:, None] * BYTES + b[None, :], mask=inside, other=0).to(tl.int32)
    counts = ones(byte)
    before = tl.cumsum(counts, 1) - counts
    place = before[:, :, None] + ones(byte[:, :, None] & ((1 << i) - 1)[None, None, :])
    marked = ((byte[:, :, None] >> i[None, None, :]) & 1 != 0) & (place < KEPT)
    number = tl.load(kept + (token * KEPT)[:, None, None] + place, mask=marked, other=0.0)
    return tl.reshape(number, [token.shape[0], BLOCK]).to(tl.float32)


@triton.jit
@no_type_check
def ones(byte):
    """How many bits of a byte are set."""
    pairs = byte - (byte >> 1 & 0x55)
    fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return (fours + (fours >> 4)) & 0xF


@triton.jit(do_not_specialize=["groups", "width", "dropped_width"])
@no_type_check
def _attend_sparse(
    q, planes, table, lengths, mass, dropped, out, lse, logits, scale, groups, width, dropped_width,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, KEPT: tl.constexpr, VALUE_KEPT: tl.constexpr,
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
        key = whole(planes[0], planes[1], token, seen, D, KEPT, BLOCK_D)
        value = whole(planes[2], planes[3], token, seen, DV, VALUE_KEPT, BLOCK_DV)
        product = tl.dot(query.to(tl.float32), tl.trans(key), input_precision=PRECISION)
        logit = scored(product, scale, mass, logits, row, groups, g, width * PAGE, slot, token, here, seen)
        best, total, acc = added(logit, value, best, total, acc, False)
    left(out, lse, row, groups, g, best, total, acc, DV, BLOCK_DV)
