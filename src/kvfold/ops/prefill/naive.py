"""Dense causal attention by its definition, a block of queries at a time, in float32."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register

BLOCK = 128


@register("causal", "naive", rank=0)
def causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sums: bool, shares: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    grouped = q.reshape(b, h, hq // h, n, d)
    out = q.new_empty(b, h, hq // h, n, v.shape[-1])
    lse = q.new_empty(b, h, hq // h, n, dtype=torch.float32)
    total = torch.zeros(b, h, t, device=q.device, dtype=torch.float32) if sums else None
    for i in range(0, n, BLOCK):
        j = min(i + BLOCK, n)
        asked, stop = torch.arange(i, j, device=q.device)[:, None] + t - n, j + t - n
        oldest = max(0, i + t - n + 1 - window) if window else 0
        keys = torch.arange(oldest, stop, device=q.device)
        logits = torch.einsum("bhgqd,bhtd->bhgqt", grouped[..., i:j, :].float(), k[:, :, oldest:stop].float()) * scale
        unseen = (keys > asked) | (keys <= asked - window) if window else keys > asked
        logits = logits.masked_fill(unseen, -torch.inf)
        lse[..., i:j] = logits.logsumexp(-1)
        weights = torch.exp(logits - lse[..., i:j, None])
        out[..., i:j, :] = torch.einsum("bhgqt,bhtd->bhgqd", weights, v[:, :, oldest:stop].float()).to(q.dtype)
        if total is not None:
            counted = weights if shares is None else weights * shares[i:j, None]
            total[..., oldest:stop] += counted.sum((2, 3))
    return out.view(b, hq, n, -1), lse.view(b, hq, n), total
