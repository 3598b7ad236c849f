"""The highest scores by selection, in linear time."""

import torch
from torch import Tensor

from kvfold.ops.choose import naive
from kvfold.ops.cpu import use_threads
from kvfold.ops.dispatch import register


@register("top_mask", "cpu", rank=10, fits=lambda x: x.device.type == "cpu" and x.dtype == torch.float32)
def top_mask(scores: Tensor, count: Tensor) -> Tensor:
    if not scores.numel():
        return naive.top_mask(scores, count)
    from kvfold.ops.choose import cpu_kernels

    use_threads()
    rows = scores.detach().reshape(-1, scores.shape[-1]).contiguous()
    chosen = torch.empty(rows.shape, dtype=torch.bool)
    counts = count.expand(scores.shape[:-1]).reshape(-1).to(torch.int64).contiguous()
    cpu_kernels.top_mask(rows.numpy(), counts.numpy(), chosen.numpy())
    return chosen.view(scores.shape)
