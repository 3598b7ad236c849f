"""A vector as a maximum and one symbol for each of its numbers, as CacheGen's code does it (arXiv:2310.07240)."""

import torch
from jaxtyping import Float, Integer
from torch import Tensor


def largest(bins: int) -> int:
    """Q: symbols are in [0, 2 Q], and Q is zero."""
    return bins // 2 - 1


def maxima_of(x: Float[Tensor, "N D"], vector: Integer[Tensor, "N"], count: int) -> Float[Tensor, "M"]:
    """The largest magnitude in each of `count` vectors; row i of x belongs to vector[i]."""
    found = x.new_zeros(count)
    return found.scatter_reduce_(0, vector, x.abs().amax(1), "amax") if x.numel() else found


def quantise(
    x: Float[Tensor, "N D"], maxima: Float[Tensor, "M"], vector: Integer[Tensor, "N"], bins: int
) -> Integer[Tensor, "N D"]:
    """round(x Q / m + Q), ties to even, as uint8; a vector of zeros is Q everywhere."""
    q, m = largest(bins), maxima.double()[vector][:, None]
    return torch.where(m > 0, x.double() * q / m + q, float(q)).round().clamp(0, 2 * q).to(torch.uint8)


def dequantise(
    symbols: Integer[Tensor, "N D"], maxima: Float[Tensor, "M"], vector: Integer[Tensor, "N"], bins: int
) -> Float[Tensor, "N D"]:
    """(symbol - Q) / Q m in float64, rounded to the maxima's dtype: operations that IEEE 754 fixes to the last bit."""
    q = largest(bins)
    return ((symbols.double() - q) / q * maxima.double()[vector][:, None]).to(maxima.dtype)
