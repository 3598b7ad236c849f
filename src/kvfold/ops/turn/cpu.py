"""Turns with the compiled kernel: cos and sin once for all heads that turn alike."""

import torch
from torch import Tensor

from kvfold.ops.cpu import bits, fits, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.turn import naive
from kvfold.ops.turn.pairs import Pairs


@register("turn", "cpu", rank=10, fits=fits)
def turn(x: Tensor, steps: Tensor, pairs: Pairs) -> Tensor:
    (b, h, t, d), half = x.shape, len(pairs.angles)
    if not x.numel() or not widths_fit(d, half, pairs.first):
        return naive.turn(x, steps, pairs)
    from kvfold.ops import _cpu

    alike = not steps.stride(1) or torch.equal(steps[:, 1:], steps[:, :-1])
    rows, heads = (b, h) if alike else (b * h, 1)
    asked = (steps[:, 0] if alike else steps).reshape(rows, t).to(torch.int32).contiguous().numpy()
    out = torch.empty(x.shape, dtype=torch.float32)
    _cpu.turn(
        bits(x).reshape(rows, heads, t, d), asked, pairs.angles, pairs.first, pairs.neighbours, threads(),
        out.numpy().reshape(rows, heads, t, d),
    )  # fmt: skip
    return out.to(x.dtype)
