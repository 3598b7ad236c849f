"""How many queries look at a token: what a sum of attention is divided by to get a mean."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.views import LayerView


def reach(view: LayerView, fade: float = math.inf) -> Float[Tensor, "B H T"]:
    """How many of this pass's queries look at each token, those far from the end of the text counting less.

    `fade` as in `LayerView.column_sums`: that over this is a mean. Behind a layer where some of a prompt ended, those
    count that came.
    """
    seen = view.place.seen.to(view.valid.device)[:, None]
    asked_at = view.queries.positions.masked_fill(~view.queries.valid, -1).sort(1).values
    share = torch.exp((asked_at + 1 - seen) / (fade * seen.float())).masked_fill(asked_at < 0, 0.0)
    from_here = F.pad(share.flip(1).cumsum(1).flip(1), (0, 1))  # B Q+1
    slots = torch.searchsorted(asked_at, view.positions.flatten(1).contiguous().to(asked_at.dtype))
    return from_here.gather(1, slots).view(view.positions.shape)
