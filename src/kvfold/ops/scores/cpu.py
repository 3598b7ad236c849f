"""Column sums with a Numba kernel, for queries that did not bring them from their own forward pass."""

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import fits, floats, use_threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.prefill.cpu import panels, tile
from kvfold.ops.scores import blocked


@register("column_sums", "cpu", rank=20, fits=fits)
def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float, start: Tensor, bias: Tensor | None = None) -> Tensor:
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    if not (widths_fit(d) and fits(k)) or not t:
        return blocked.column_sums(q, k, lse, scale, start, bias)
    from kvfold.ops.prefill import cpu_kernels

    use_threads()
    sums = torch.zeros(b * h, cpu_kernels.PARTS, t, dtype=torch.float32)
    extra = np.empty((b * h, 0), dtype=np.float32) if bias is None else floats(bias.expand(b, h, t)).reshape(b * h, t)
    cpu_kernels.column_sums(
        floats(q).reshape(b * h, hq // h, n, d), panels(k), floats(lse).reshape(b * h, hq // h, n), extra,
        start.expand(b, h).to(torch.int64).reshape(-1).contiguous().cpu().numpy(), np.float32(scale), tile(t),
        sums.numpy(),
    )  # fmt: skip
    return sums.sum(1).view(b, h, t)
