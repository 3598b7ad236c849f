"""Attention over stored tokens by its definition, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.ops.dispatch import register


@register("attend", "naive", rank=0)
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    logits = torch.einsum("bhqd,bhtd->bhqt", q.float(), k.float()) * scale
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhqt,bhtd->bhqd", weights, v.float()).to(q.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial answers (out, lse) over disjoint tokens become the answer over all of them. Exact."""
    if len(parts) == 1:
        return parts[0]
    outs = torch.stack([out.float() for out, _ in parts])
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))
    return (outs * weights[..., None]).sum(0).to(parts[0][0].dtype), lse
