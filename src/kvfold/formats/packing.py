"""Codes of four bits: rounding to sixteen steps between the least and the greatest, and two codes in a byte."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

STEPS = 15
"""The largest code."""


def quantise(x: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 along `dim`, and scale and zero in `dtype` (1 long there): x is about code * scale + zero.

    Codes are those of the scale and zero that are kept, rounded as they are.
    """
    low, high = x.float().amin(dim, keepdim=True), x.float().amax(dim, keepdim=True)
    zero = low.to(dtype)
    scale = (high / STEPS - zero.float() / STEPS).to(dtype)  # apart: their difference might not be finite
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = ((x.float() - zero.float()) / scale.float()).round_().clamp_(0, STEPS)
    return codes.nan_to_num_(0.0).to(torch.uint8), scale, zero


def pack(codes: UInt8[Tensor, "... D"]) -> UInt8[Tensor, "... W"]:
    """Two codes a byte: those of the first half of a vector in the low bits, of the second half in the high ones."""
    half = -(-codes.shape[-1] // 2)
    low, high = codes[..., :half], pad(codes[..., half:], (0, codes.shape[-1] % 2))
    return low | (high << 4)


def unpack(packed: UInt8[Tensor, "... W"], size: int) -> Float[Tensor, "... D"]:
    """The codes of vectors of `size` numbers, as float32."""
    return torch.cat([packed & STEPS, packed >> 4], -1)[..., :size].float()
