"""Codes of 2, 3, 4 or 8 bits: rounding to steps between the least and the greatest, and how codes lie in bytes.

A vector's numbers go into units of 16 bytes, as four words side by side: number i of a unit lies in word i % 4, from
bit `bits * (i // 4)` on. So four numbers that follow each other are four lanes at one shift, whatever the width of a
processor's registers, and no code is split. A last unit that is not full has words of as few bytes as will do. Of three
bits the lower two lie so, and behind them the third of the same numbers, in words of their own: those of the lower and
of the upper half of a word of 32 bits by turns, so that one shift brings every second one to its place.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

BITS = (2, 3, 4, 8)
"""Bits that a code may have."""
WORDS = 4
"""Words of a unit."""
TURNS = [place % 2 * 8 + place // 2 for place in range(16)]
"""Of 16 codes in a word, whose third bit comes at each place."""
HALVES = [TURNS.index(place) for place in range(16)]
"""The way back."""


def steps(bits: int) -> int:
    """The largest code."""
    return (1 << bits) - 1


def quantise(x: Tensor, dim: int, dtype: torch.dtype, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 2^bits - 1 along `dim`, and scale and zero in `dtype` (1 long there): x is about code * scale + zero.

    Codes are those of the scale and zero that are kept, rounded as they are. What `dtype` can't hold is cut to its
    largest number; what is not finite stays so.
    """
    low, high = x.float().amin(dim, keepdim=True), x.float().amax(dim, keepdim=True)
    zero = _held(low, dtype)
    scale = _held(high / steps(bits) - zero.float() / steps(bits), dtype)  # apart: their difference might not be finite
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = ((x.float() - zero.float()) / scale.float()).round_().clamp_(0, steps(bits))
    return codes.nan_to_num_(0.0).to(torch.uint8), scale, zero


def _held(x: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-most, most)).to(dtype)


def unit(bits: int) -> int:
    """Numbers of a unit."""
    return 64 if bits == 3 else 8 * 4 * WORDS // bits


def width(size: int, bits: int) -> int:
    """Bytes of a vector of `size` codes."""
    return sum(WORDS * sum(_word_bytes(numbers, bits)) for numbers in _units(size, bits))


def pack(codes: UInt8[Tensor, "... D"], bits: int) -> UInt8[Tensor, "... W"]:
    """Codes as bytes; the room that is left holds zeros."""
    parts, units = [], _units(codes.shape[-1], bits)
    whole = len(units) if units and units[-1] == unit(bits) else len(units) - 1
    for some in (codes[..., : whole * unit(bits)], codes[..., whole * unit(bits) :]):
        if some.shape[-1]:
            numbers = min(some.shape[-1], unit(bits))
            each = _split(some, some.shape[-1] // numbers, numbers)
            low, high = _word_bytes(numbers, bits)
            packed = _packed(each & 3 if high else each, low, 2 if high else bits)
            if high:
                packed = torch.cat(
                    [packed, _packed(_by_turns(each >> 2, TURNS) if high == 2 else each >> 2, high, 1)], -1
                )
            parts.append(packed.flatten(-2))
    return torch.cat(parts, -1)


def unpack(packed: UInt8[Tensor, "... W"], size: int, bits: int) -> Float[Tensor, "... D"]:
    """The codes of vectors of `size` numbers, as float32."""
    parts, first, units = [], 0, _units(size, bits)
    whole = sum(numbers == unit(bits) for numbers in units)
    for count, numbers in ((whole, unit(bits)), (len(units) - whole, units[-1] if units else 0)):
        if count:
            low, high = _word_bytes(numbers, bits)
            stop = first + count * WORDS * (low + high)
            each = _split(packed[..., first:stop], count, WORDS * (low + high))
            codes = _unpacked(each[..., : WORDS * low], 2 if high else bits)
            if high:
                third = _unpacked(each[..., WORDS * low :], 1)
                third = _by_turns(third, HALVES) if high == 2 else third
                codes = codes[..., :numbers] | (third[..., :numbers] << 2)
            parts.append(codes[..., :numbers].flatten(-2))
            first = stop
    return torch.cat(parts, -1)[..., :size].float()


def _split(x: Tensor, *sizes: int) -> Tensor:
    """The last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def _units(size: int, bits: int) -> list[int]:
    """Numbers of each unit of a vector."""
    whole, rest = divmod(size, unit(bits))
    return [unit(bits)] * whole + [rest] * (rest > 0)


def _word_bytes(numbers: int, bits: int) -> tuple[int, int]:
    """Bytes of a word of a unit with so many numbers, and of a word of their third bits (0: there are none)."""
    each = -(-numbers // WORDS) * (2 if bits == 3 else bits)
    low = next(size for size in (1, 2, 4) if each <= 8 * size)
    return low, max(1, low // 2) if bits == 3 else 0


def _by_turns(codes: Tensor, order: list[int]) -> Tensor:
    """Codes (..., N) of the places of words in another order, (..., 64)."""
    places = _split(pad(codes, (0, WORDS * len(order) - codes.shape[-1])), len(order), WORDS)
    return places[..., order, :].flatten(-2)


def _packed(codes: Tensor, word: int, bits: int) -> Tensor:
    """Codes (..., N) as the bytes (..., 4 * word) of four words."""
    codes = pad(codes, (0, WORDS * word * 8 // bits - codes.shape[-1]))
    places = _split(codes, word, 8 // bits, WORDS)  # byte of a word, place in the byte, word
    packed = places[..., 0, :].clone()
    for place in range(1, 8 // bits):
        packed |= places[..., place, :] << (bits * place)
    return packed.transpose(-1, -2).flatten(-2)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    words = _split(packed, WORDS, packed.shape[-1] // WORDS).transpose(-1, -2)  # byte of a word, word
    return torch.stack([(words >> (bits * place)) & steps(bits) for place in range(8 // bits)], -2).flatten(-3)
