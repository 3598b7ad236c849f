"""How many queries could look at a token: what a sum of attention is divided by to get a mean."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.views import LayerView


def reach(view: LayerView, fade: float = math.inf) -> Float[Tensor, "B H T"]:
    """The number of queries from each token to the end of the text, those far from the end counting less.

    `fade` as in `LayerView.column_sums`. Of this pass those that came as far as this layer; of earlier passes all.
    """
    seen = view.place.seen.to(view.valid.device)[:, None]
    rate = -1.0 / (fade * seen.float())
    asked_at = view.queries.positions.masked_fill(~view.queries.valid, -1).sort(1).values
    share = torch.exp(rate * (seen - 1 - asked_at)).masked_fill(asked_at < 0, 0.0)
    from_here = F.pad(share.flip(1).cumsum(1).flip(1), (0, 1))  # B Q+1
    slots = torch.searchsorted(asked_at, view.positions.flatten(1).contiguous().to(asked_at.dtype))
    first = torch.cat([torch.where(asked_at < 0, seen, asked_at), seen], 1).amin(1, keepdim=True)
    earlier = (first[..., None] - view.positions).clamp(min=0)
    if fade < math.inf:  # 1 + r + ... + r^(n-1), for n queries from a token to this pass
        rate, gap = rate[..., None], (seen - first)[..., None]
        earlier = torch.exp(rate * gap) * torch.expm1(rate * earlier) / torch.expm1(rate)
    return (from_here.gather(1, slots).view(view.positions.shape) + earlier).clamp(min=1.0)
