"""Attention over tokens in codes in Triton: each token's numbers are levels or steps of its own.

Codes are read as they are stored and become numbers in registers. Triton is optional: nothing imports this module
before it is asked for.
"""

from dataclasses import dataclass
from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int8, Int32, UInt8
from torch import Tensor

from kvfold.ops.codes.triton_packing import code_block, numbers, words
from kvfold.ops.tokens.coding import Coding
from kvfold.ops.triton_rows import PRECISION, added, attend_rows, counted, left, queries, scored, share, walk

TILE = 32
"""Tokens of a tile: keys and values become float32, which must find room in registers."""


@dataclass(frozen=True)
class Side:
    """Keys, or values: planes of codes and scales, levels on the device or a plane of zeros, and how to read them."""

    coding: Coding
    codes: UInt8[Tensor, "N P W"]
    levels: Float32[Tensor, " _"] | None
    scale: Float[Tensor, "N P C"]
    zero: Float[Tensor, "N P C"] | None


def attend(
    q: Float[Tensor, "R G D"],
    keys: Side,
    values: Side,
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
    key, value = keys.coding, values.coding
    planes = [x for side in (keys, values) for x in (words(side.codes), side.levels, side.scale, side.zero)]
    constants = {
        "KEY_BITS": key.bits, "VALUE_BITS": value.bits, "KEY_GROUPS": key.groups, "VALUE_GROUPS": value.groups,
        "BLOCK_T": TILE, "BLOCK_D": code_block(key.size, key.bits), "BLOCK_DV": code_block(value.size, value.bits),
        "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    return attend_rows(
        _attend_tokens, q, tuple(planes), table, lengths, scale, page=keys.codes.shape[1], dv=value.size, mass=mass,
        dropped=dropped, splits=splits, probabilities=probabilities, constants=constants,
    )  # fmt: skip


# `no_type_check`: see kvfold.ops.triton_rows.
@triton.jit(do_not_specialize=["groups", "width", "dropped_width"])
@no_type_check
def _attend_tokens(
    q, planes, table, lengths, mass, dropped, out, lse, logits, scale, groups, width, dropped_width,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr, VALUE_GROUPS: tl.constexpr,
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
        key = numbers(planes[0], planes[1], planes[2], planes[3], token, seen, D, KEY_BITS, KEY_GROUPS, BLOCK_D)
        value = numbers(planes[4], planes[5], planes[6], planes[7], token, seen, DV, VALUE_BITS, VALUE_GROUPS, BLOCK_DV)
        product = tl.dot(query.to(tl.float32), tl.trans(key), input_precision=PRECISION)
        logit = scored(product, scale, mass, logits, row, groups, g, width * PAGE, slot, token, here, seen)
        best, total, acc = added(logit, value, best, total, acc, False)
    left(out, lse, row, groups, g, best, total, acc, DV, BLOCK_DV)
