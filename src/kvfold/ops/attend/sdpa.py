"""Attention over stored tokens with torch's fused CPU kernel, which also returns the log-sum-exp."""

import torch
from torch import Tensor

from kvfold.ops.attend import naive
from kvfold.ops.dispatch import register

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fits(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype in FLOATS and not q.requires_grad


@register("attend", "sdpa", rank=10, fits=fits)
def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if k.shape[2] == 0 or k.shape[3] != v.shape[3]:  # the fused kernel wants one head size
        return naive.attend(q, k, v, scale, bias)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if bias is None:
        out, lse = flash(q, k, v, scale=scale)
        return out, lse
    out, lse = flash(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    # It gives 0 as the log-sum-exp of a query that sees nothing.
    blind = (bias == -torch.inf).all(-1).expand(lse.shape)
    return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
