"""Dense causal attention with the compiled kernel: as fast as torch's fused one, and it can leave the column sums."""

import torch
from torch import Tensor

from kvfold.ops.cpu import fits, floats, threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.prefill import sdpa


@register("causal", "cpu", rank=20, fits=fits)
def causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sums: bool, shares: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    (b, hq, n, d), (h, t, dv) = q.shape, (*k.shape[1:3], v.shape[3])
    if not (widths_fit(d, dv) and fits(k) and fits(v)) or n == 0:
        return sdpa.causal_cpu(q, k, v, scale, window, sums, shares)
    from kvfold.ops import _cpu

    out = torch.empty(b * h, hq // h, n, dv, dtype=torch.float32)
    lse = torch.empty(b * h, hq // h, n, dtype=torch.float32)
    parts = torch.zeros(b * h, _cpu.SHARES, t, dtype=torch.float32) if sums else None
    counted = torch.ones(n, dtype=torch.float32) if shares is None else shares
    _cpu.causal(
        floats(q).reshape(b * h, hq // h, n, d), floats(k).reshape(b * h, t, d), floats(v).reshape(b * h, t, dv), scale,
        window, floats(counted), threads(), out.numpy(), lse.numpy(), None if parts is None else parts.numpy(),
    )  # fmt: skip
    total = None if parts is None else parts.sum(1).view(b, h, t)
    return out.to(q.dtype).view(b, hq, n, dv), lse.view(b, hq, n), total
