"""The highest scores by selection, in linear time."""

import torch
from torch import Tensor

from kvfold.ops.choose import naive
from kvfold.ops.cpu import library, threads
from kvfold.ops.dispatch import register


def fits(x: Tensor) -> bool:
    """A gradient may be wanted: a mask has none."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and library() is not None


@register("top_mask", "cpu", rank=10, fits=fits)
def top_mask(scores: Tensor, count: Tensor) -> Tensor:
    if not scores.numel():
        return naive.top_mask(scores, count)
    from kvfold.ops import _cpu

    rows = scores.detach().reshape(-1, scores.shape[-1]).contiguous()
    chosen = torch.empty(rows.shape, dtype=torch.bool)
    counts = count.expand(scores.shape[:-1]).reshape(-1).to(torch.int64).contiguous()
    _cpu.top_mask(rows.numpy(), counts.numpy(), chosen.numpy(), threads())
    return chosen.view(scores.shape)
