"""Attention over pages of codes in Triton: keys with a scale and a zero by channel of a page, values by runs of tokens.

A tile lies on one page, so that all of it shares what channels have. Codes are read as they are stored and become
numbers in registers. Triton is optional: nothing imports this module before it is asked for.
"""

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8, Int32, UInt8
from torch import Tensor

from kvfold.ops.codes.triton_packing import code_block, numbers, unpacked, words
from kvfold.ops.triton_rows import PRECISION, added, attend_rows, counted, left, queries, scored, share, walk

LARGEST_TILE = 32
"""Tokens of a tile: keys and values become float32, which must find room in registers."""


def attend(
    q: Float[Tensor, "R G D"],
    keys: tuple[UInt8[Tensor, "N P W"], Float[Tensor, "N D"], Float[Tensor, "N D"]],
    values: tuple[UInt8[Tensor, "N P V"], Float[Tensor, "N P C"], Float[Tensor, "N P C"]],
    table: Int32[Tensor, "R M"],
    lengths: Int32[Tensor, " R"],
    scale: float,
    *,
    bits: int,
    value_size: int,
    mass: Float32[Tensor, "N P"] | None = None,
    dropped: Int8[Tensor, "R _"] | None = None,
    splits: int | None = None,
    probabilities: bool = False,
) -> tuple[Float[Tensor, "R G Dv"], Float32[Tensor, "R G"], Float32[Tensor, "R G S"] | None]:
    """(out, lse, probabilities or None) over `keys` and `values`: codes of `bits` bits, scales and zeros.

    Otherwise as `kvfold.ops.triton_rows.attend_rows` has it.
    """
    page, (codes, *shared), (value_codes, *value_shared) = keys[0].shape[1], keys, values
    tile = min(LARGEST_TILE, max(16, triton.next_power_of_2(page)))
    constants = {
        "ROOM": triton.cdiv(page, tile) * tile, "BITS": bits, "GROUPS": value_shared[0].shape[-1], "BLOCK_T": tile,
        "BLOCK_D": code_block(q.shape[2], bits), "BLOCK_DV": code_block(value_size, bits),
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    return attend_rows(
        _attend_codes, q, (words(codes), *shared, words(value_codes), *value_shared), table, lengths, scale,
        page=page, dv=value_size, mass=mass, dropped=dropped, splits=splits, probabilities=probabilities,
        constants=constants,
    )  # fmt: skip


# `no_type_check`: see kvfold.ops.triton_rows.
@triton.jit(do_not_specialize=["groups", "width", "dropped_width"])
@no_type_check
def _attend_codes(
    q, planes, table, lengths, mass, dropped, out, lse, logits, scale, groups, width, dropped_width,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, ROOM: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    g, query = queries(q, row, groups, D, BLOCK_G, BLOCK_D)
    first, last = share(lengths, row, PAGE, ROOM, BLOCK_T)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_DV], tl.float32)
    for start in range(first, last, BLOCK_T):
        slot, token, here = walk(table, row, width, start, last, PAGE, ROOM, BLOCK_T)
        seen = counted(dropped, row, dropped_width, slot, here)
        page = tl.load(table + row * width + start // ROOM).to(tl.int64)
        shared, inside = page * D + d, d < tl.where(page >= 0, D, 0)
        step = tl.load(planes[1] + shared, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(planes[2] + shared, mask=inside, other=0.0).to(tl.float32)
        key = unpacked(planes[0], token, seen, D, BITS, BLOCK_D) * step[None, :] + zero[None, :]
        value = numbers(planes[3], None, planes[4], planes[5], token, seen, DV, BITS, GROUPS, BLOCK_DV)
        product = tl.dot(query.to(tl.float32), tl.trans(key), input_precision=PRECISION)
        logit = scored(product, scale, mass, logits, row, groups, g, width * PAGE, slot, token, here, seen)
        best, total, acc = added(logit, value, best, total, acc, False)
    left(out, lse, row, groups, g, best, total, acc, DV, BLOCK_DV)
