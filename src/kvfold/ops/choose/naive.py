"""The highest scores by a stable sort."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register


@register("top_mask", "naive", rank=0)
def top_mask(scores: Tensor, count: Tensor) -> Tensor:
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    first = torch.arange(scores.shape[-1], device=scores.device) < count[..., None]
    return torch.zeros_like(first.expand_as(scores)).scatter(-1, order, first.expand_as(scores)) & (scores > -torch.inf)
