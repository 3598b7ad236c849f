"""Attention before its normalisation: exp(q k) of the newest queries, as logarithms."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.views import LayerView


def log_exponents(view: LayerView, window: int, decay: float) -> tuple[Float[Tensor, "B H T"], Int[Tensor, "B H T"]]:
    """Log of the mean of exp(q k) over each row's last `window` queries that see a token, and how many they are.

    Query heads of a group are averaged, in the same domain. The newest query weighs 1, the one before it `decay`, and
    so on. 0 where nobody looks.
    """
    asked = view.queries.last(window)
    (b, hq, w, d), h = asked.states.shape, view.heads
    logits = (asked.states.float().view(b, h, hq // h * w, d) * view.place.scale) @ view.keys.float().mT
    found = logits.view(b, h, hq // h, w, -1).logsumexp(2) - math.log(hq // h)  # B H W T
    asked_at = asked.positions.masked_fill(~asked.valid, -1)
    seen = (view.positions[:, :, None] <= asked_at[:, None, :, None]) & view.valid[:, :, None]
    if w == 1:
        return found[:, :, 0].masked_fill(~seen[:, :, 0], 0.0), seen[:, :, 0].long()
    ages = torch.arange(w - 1, -1, -1, device=found.device, dtype=torch.float32)
    weight = torch.pow(torch.tensor(float(decay), device=found.device, dtype=torch.float32), ages)[
        :, None
    ].log()  # 0^0 = 1
    weight = weight.expand_as(found).masked_fill(~seen, -torch.inf)
    found = torch.where(seen, found, 0.0)  # padding may hold anything
    mean = (found + weight).logsumexp(2) - weight.logsumexp(2)
    times = seen.sum(2)
    return mean.masked_fill(weight.isinf().all(2), 0.0), times
