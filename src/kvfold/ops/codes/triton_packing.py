"""Codes in Triton, as `packing` lays them: words of a tile of tokens become numbers in the order of their channels.

The four words of a unit are read side by side and spread over the places in them, so that memory is read once for all
codes of a word. Tiles are of whole units: what is behind a vector's last number is finite, and no number.
Triton is optional: nothing imports this module before it is asked for.
"""

# `no_type_check`: see kvfold.ops.triton_rows.

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32, UInt8
from torch import Tensor

from kvfold.ops.codes.packing import unit


def words(plane: UInt8[Tensor, "N P W"]) -> Int32[Tensor, "N P V"]:
    """The bytes of codes as words of four: a vector has a multiple of four bytes."""
    return plane.view(torch.int32)


def code_block(size: int, bits: int) -> int:
    """The tile that takes vectors of so many codes: a power of two of whole units."""
    return max(16, int(triton.next_power_of_2(-(-size // unit(bits)))) * unit(bits))


@triton.jit
@no_type_check
def unpacked(plane, token, here, SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The codes of tokens (T,), which `plane` holds as `words`: (T, BLOCK), int32; of tokens not here zeros."""
    UNIT: tl.constexpr = 64 if BITS == 3 else 128 // BITS
    BYTES: tl.constexpr = 24 if BITS == 3 else 16  # of a whole unit
    LOW: tl.constexpr = 2 if BITS == 3 else BITS  # bits of a code that lie together
    WHOLE: tl.constexpr = SIZE // UNIT
    EACH: tl.constexpr = (SIZE % UNIT + 3) // 4 * LOW  # bits of a word of the last unit, if that is short
    SHORT: tl.constexpr = (1 if EACH <= 8 else 2 if EACH <= 16 else 4) if EACH > 0 else 0  # its bytes
    THIRD: tl.constexpr = (2 if SHORT == 4 else 1) if BITS == 3 and SHORT > 0 else 0  # those of a word of third bits
    WIDTH: tl.constexpr = WHOLE * BYTES + 4 * (SHORT + THIRD)

    u, w, k = tl.arange(0, BLOCK // UNIT)[:, None], tl.arange(0, 4)[None, :], tl.arange(0, UNIT // 4)
    row = plane + token[:, None, None] * (WIDTH // 4)
    inside = here[:, None, None] & (u * UNIT < SIZE)[None, :, :]
    whole = u < WHOLE
    at = u * BYTES + w * (4 if SHORT == 0 else tl.where(whole, 4, SHORT))
    low = tl.load(row + (at // 4)[None, :, :], mask=inside, other=0) >> (at % 4 * 8)[None, :, :]
    codes = (low[:, :, None, :] >> (k * LOW)[None, None, :, None]) & ((1 << LOW) - 1)
    if BITS == 3:
        # Third bits lie behind the lower two; those of the lower and of the upper half of 16 places come by turns.
        at = u * BYTES + (16 + w * 2 if SHORT == 0 else tl.where(whole, 16 + w * 2, SHORT * 4 + w * THIRD))
        third = tl.load(row + (at // 4)[None, :, :], mask=inside, other=0) >> (at % 4 * 8)[None, :, :]
        turn = (k % 8 * 2 + k // 8)[None, :]
        turn = turn if SHORT == 0 or THIRD == 2 else tl.where(whole, turn, k[None, :])  # u k
        codes |= ((third[:, :, None, :] >> turn[None, :, :, None]) & 1) << 2
    return tl.reshape(codes, [token.shape[0], BLOCK])


@triton.jit
@no_type_check
def spread(plane, token, here, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """What runs of a token's channels share, from `plane` (N, P, GROUPS), for each channel: float32, 0 if not here."""
    if SIZE == BLOCK:  # a power of two, and so are its runs: one load for each of them, or for each fourth of a vector,
        # since what has fewer numbers than a program has threads is loaded again wherever it goes.
        RUNS: tl.constexpr = GROUPS if GROUPS > 4 else 4
        places = token[:, None] * GROUPS + (tl.arange(0, RUNS) * GROUPS // RUNS)[None, :]
        each = tl.load(plane + places, mask=here[:, None], other=0.0)[:, :, None]
        shared = tl.reshape(tl.broadcast_to(each, [token.shape[0], RUNS, SIZE // RUNS]), [token.shape[0], BLOCK])
    else:
        d = tl.arange(0, BLOCK)
        places = token[:, None] * GROUPS + (d // (SIZE // GROUPS))[None, :]
        shared = tl.load(plane + places, mask=here[:, None] & (d < SIZE)[None, :], other=0.0)
    return shared.to(tl.float32)


@triton.jit
@no_type_check
def numbers(
    codes, levels, scale, zero, token, here,
    SIZE: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What codes of tokens stand for, (T, BLOCK), float32: levels times a scale; without levels, steps and a zero."""
    code, step = unpacked(codes, token, here, SIZE, BITS, BLOCK), spread(scale, token, here, SIZE, GROUPS, BLOCK)
    if levels is None:
        number = code * step + spread(zero, token, here, SIZE, GROUPS, BLOCK)
    else:
        number = tl.load(levels + code) * step
    return number
