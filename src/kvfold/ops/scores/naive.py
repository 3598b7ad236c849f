"""Attention scores by their definition, in float32."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register


@register("window_attention", "naive", rank=0)
def window_attention(
    q: Tensor, k: Tensor, scale: float, seen: Tensor, bias: Tensor | None = None, lse: Tensor | None = None
) -> Tensor:
    logits = torch.einsum("bhgwd,bhtd->bhgwt", q.float(), k.float()) * scale
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    shares = torch.softmax(logits, -1) if lse is None else torch.exp(logits - lse[..., None])
    return shares.nan_to_num(0.0)


@register("column_sums", "naive", rank=0)
def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float, start: Tensor, bias: Tensor | None = None) -> Tensor:
    (b, hq, n, _), (h, t) = q.shape, k.shape[1:3]
    logits = torch.einsum("bhgqd,bhtd->bhgqt", q.view(b, h, hq // h, n, -1).float(), k.float()) * scale
    if bias is not None:
        logits = logits + bias[:, :, None, None]
    own = start.to(q.device)[..., None] + torch.arange(n, device=q.device)  # B H Q
    future = torch.arange(t, device=q.device) > own[..., None]
    lse = lse.view(b, h, hq // h, n, 1)
    probs = torch.exp(logits - lse).masked_fill(future[:, :, None] | (lse == torch.inf), 0.0)
    return probs.sum((2, 3))
