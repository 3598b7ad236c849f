"""The most similar vector by its definition, a block of those that ask at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.ops.dispatch import register

BLOCK_ELEMENTS = 1 << 22
"""Similarities held at once: 16 MB."""


@register("most_alike", "naive", rank=0)
def most_alike(
    asking: Sequence[Tensor], others: Sequence[Tensor], asks: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    (b, h, n), m = asking[0].shape[:3], others[0].shape[2]
    best = torch.full((b, h, n), -torch.inf, device=asking[0].device, dtype=torch.float32)
    first = torch.zeros(b, h, n, dtype=torch.int64, device=best.device)
    able = torch.arange(m, device=best.device) < there[..., None]  # B H M
    size = max(1, BLOCK_ELEMENTS // max(1, b * h * m))
    for at in range(0, n if m else 0, size):
        alike = None
        for x, y in zip(asking, others, strict=True):
            product = x[:, :, at : at + size].float() @ y.float().mT  # B H N M
            alike = product if alike is None else alike.clamp(min=0) * product.clamp(min=0)
        assert alike is not None
        alike = torch.where(able[:, :, None], alike, -torch.inf)
        best[:, :, at : at + size], first[:, :, at : at + size] = alike.max(-1)
    idle = torch.arange(n, device=best.device) >= asks[..., None]
    idle |= best == -torch.inf
    return best.masked_fill(idle, -torch.inf), first.masked_fill(idle, 0)
