"""Random numbers that depend on what they are for, not on when they are drawn: the same in any batch or block."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def hashed(first: Int[Tensor, "..."], *parts: int | Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """32 random bits (as int32) for each combination of integers; tensors broadcast."""
    found = _scramble(first.to(torch.int32))
    for part in parts:
        found = _scramble(found * _signed(0x9E3779B1) + (_signed(part) if isinstance(part, int) else part.int()))
    return found


def crossed(a: Int[Tensor, "..."], b: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """32 random bits for each pair of two hashed numbers; one pass over the pairs."""
    return _scramble(a ^ b)


def gumbel(bits: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Standard Gumbel numbers, -log(-log(u)) in float32, from hashed bits; u is never 0 or 1."""
    u = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return u.log_().neg_().log_().neg_()


def _scramble(x: Tensor) -> Tensor:
    """A bijection of 32 bits with little bias (Wellons' lowbias32); products wrap around."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= _signed(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def _signed(number: int) -> int:
    """The low 32 bits as an int32."""
    return ((number + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
