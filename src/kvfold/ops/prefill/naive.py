"""Dense causal attention by its definition, a block of queries at a time, in float32."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register

BLOCK = 128


def faded(count: int, fade: float, device: torch.device) -> Tensor:
    """What each of `count` queries counts: exp(-distance to the last / (fade * count))."""
    distance = torch.arange(count - 1, -1, -1, device=device, dtype=torch.float32)
    return torch.exp(-distance / (fade * count))


@register("causal", "naive", rank=0)
def causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sums: bool, fade: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    (b, hq, t, d), h = q.shape, k.shape[1]
    grouped = q.view(b, h, hq // h, t, d)
    out = q.new_empty(b, h, hq // h, t, v.shape[-1])
    lse = q.new_empty(b, h, hq // h, t, dtype=torch.float32)
    total = torch.zeros(b, h, t, device=q.device, dtype=torch.float32) if sums else None
    shares = faded(t, fade, q.device)
    for i in range(0, t, BLOCK):
        j = min(i + BLOCK, t)
        logits = torch.einsum("bhgqd,bhtd->bhgqt", grouped[..., i:j, :].float(), k[:, :, :j].float()) * scale
        future = torch.arange(j, device=q.device) > torch.arange(i, j, device=q.device)[:, None]
        logits = logits.masked_fill(future, -torch.inf)
        lse[..., i:j] = logits.logsumexp(-1)
        weights = torch.exp(logits - lse[..., i:j, None])
        out[..., i:j, :] = torch.einsum("bhgqt,bhtd->bhgqd", weights, v[:, :, :j].float()).to(q.dtype)
        if total is not None:
            total[..., :j] += (weights * shares[i:j, None]).sum((2, 3))
    return out.view(b, hq, t, -1), lse.view(b, hq, t), total
