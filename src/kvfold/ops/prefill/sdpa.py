"""Dense causal attention with torch's fused kernels, which also return the log-sum-exp."""

import torch
from torch import Tensor

from kvfold.ops.attend.sdpa import flash_cpu
from kvfold.ops.cpu import FLOATS, fits
from kvfold.ops.dispatch import register
from kvfold.ops.prefill import naive


@register("causal", "sdpa", rank=10, fits=fits)
def causal_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sums: bool, fade: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    if k.shape[3] != v.shape[3]:
        return naive.causal(q, k, v, scale, sums, fade)
    return *flash_cpu(q, k, v, is_causal=True, scale=scale), None


@register("causal", "sdpa-cuda", rank=10, fits=lambda q: q.device.type == "cuda" and q.dtype in FLOATS)
def causal_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sums: bool, fade: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The memory-efficient kernel: every dtype, and a log-sum-exp (padded to a multiple of 32 queries)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, compute_log_sumexp=True, is_causal=True, scale=scale
    )
    return out, lse[..., : q.shape[2]], None
