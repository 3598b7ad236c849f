"""A linear layer with the compiled kernel: weights of any float type are read once, as they lie, for all rows."""

import torch
from torch import Tensor

from kvfold.ops.cpu import bits, fits, floats, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.linear import naive


@register("linear", "cpu", rank=10, fits=fits)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    given = fits(x) and (bias is None or fits(bias))
    if not (given and widths_fit(*weight.shape) and weight.numel() and weight.is_contiguous()):
        return naive.linear(x, weight, bias)
    from kvfold.ops import _cpu

    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    _cpu.linear(floats(x), bits(weight), None if bias is None else floats(bias), threads(), out.numpy())
    return out.to(x.dtype)
