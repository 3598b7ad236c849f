"""Turns by their definition."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register
from kvfold.ops.turn.pairs import Pairs


@register("turn", "naive", rank=0)
def turn(x: Tensor, steps: Tensor, pairs: Pairs) -> Tensor:
    first, half = pairs.first, len(pairs.angles)
    angles = torch.from_numpy(pairs.angles).to(x.device) * steps[..., None].float()
    cos, sin, wide = angles.cos(), angles.sin(), x.float()
    middle = wide[..., first : first + 2 * half]
    one, other = middle.reshape(*middle.shape[:-1], half, 2).unbind(-1) if pairs.neighbours else middle.chunk(2, -1)
    turned = one * cos - other * sin, other * cos + one * sin
    whole = torch.stack(turned, -1).flatten(-2) if pairs.neighbours else torch.cat(turned, -1)
    return torch.cat([wide[..., :first], whole, wide[..., first + 2 * half :]], -1).to(x.dtype)
