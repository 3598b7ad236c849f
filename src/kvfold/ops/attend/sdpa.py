"""Attention over stored tokens with torch's fused kernels, which also return the log-sum-exp."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.ops.attend import naive
from kvfold.ops.cpu import FLOATS, fits
from kvfold.ops.dispatch import register

flash_cpu: Callable[..., tuple[Tensor, Tensor]] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Grouped queries, any strides with the head dimension last, and a float32 log-sum-exp."""


@register("attend", "sdpa", rank=10, fits=fits)
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if k.shape[2] == 0 or k.shape[3] != v.shape[3]:  # the fused kernel wants one head size
        return naive.attend(q, k, v, scale, bias)
    if bias is None:
        return flash_cpu(q, k, v, scale=scale)
    out, lse = flash_cpu(q, k, v, attn_mask=bias, scale=scale)
    # It gives 0 as the log-sum-exp of a query that sees nothing.
    blind = (bias == -torch.inf).all(-1).expand(lse.shape)
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)


@register("attend", "sdpa-cuda", rank=10, fits=lambda q: q.device.type == "cuda" and q.dtype in FLOATS)
def attend_cuda(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel, for plain reads: a bias would have to be aligned and in the dtype of the queries."""
    if bias is not None or k.shape[2] == 0 or k.shape[3] != v.shape[3]:
        return naive.attend(q, k, v, scale, bias)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, compute_log_sumexp=True, is_causal=False, scale=scale
    )
    return out, lse[..., : q.shape[2]]
