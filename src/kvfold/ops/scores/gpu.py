"""Column sums with a Triton kernel on CUDA, for the narrow types, whose products have a matrix unit."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register
from kvfold.ops.gpu import fits


@register("column_sums", "triton", rank=20, fits=lambda q: fits(q) and q.dtype != torch.float32)
def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float, start: Tensor, bias: Tensor | None = None) -> Tensor:
    from kvfold.ops.scores import triton_kernels

    (b, h, t), start = k.shape[:3], start.expand(k.shape[:2]).to(q.device)
    wide = None if bias is None else bias.expand(b, h, t)
    return triton_kernels.column_sums(q, k, lse.float(), scale, start.to(torch.int64), wide)
