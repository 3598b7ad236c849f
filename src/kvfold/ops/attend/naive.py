"""Attention over stored tokens by its definition, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.ops.dispatch import register

BLOCK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MB."""


@register("attend", "naive", rank=0)
def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    (b, h, n, _), t = q.shape, k.shape[2]
    if t == 0:
        return q.new_zeros(b, h, n, v.shape[3]), q.new_full((b, h, n), -torch.inf, dtype=torch.float32)
    block = max(1, BLOCK_ELEMENTS // max(1, b * h * t))
    keys, values, parts = k.float(), v.float(), []
    for i in range(0, max(1, n), block):
        here = bias if bias is None or bias.shape[2] == 1 else bias[:, :, i : i + block]
        parts.append(_block(q[:, :, i : i + block], keys, values, scale, here))
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _block(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = torch.einsum("bhqd,bhtd->bhqt", q.float(), k) * scale
    if bias is not None:
        logits = logits + bias
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("bhqt,bhtd->bhqd", weights, v).to(q.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Partial answers (out, lse) over disjoint tokens become the answer over all of them. Exact."""
    if len(parts) == 1:
        return parts[0]
    outs = torch.stack([out.float() for out, _ in parts])
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = torch.exp(lses - lse.masked_fill(lse == -torch.inf, 0.0))
    return (outs * weights[..., None]).sum(0).to(parts[0][0].dtype), lse
