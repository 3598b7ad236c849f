"""Attention to earlier copies, in a text that repeats."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.views import LayerView


def stripes(view: LayerView, period: int, start: int) -> Float[Tensor, "two H G"]:
    """Attention to earlier copies of the same token, and to the tokens behind those, summed over all queries.

    The text of row 0 repeats with `period` from slot `start` on. Only the stripes of the attention matrix are worked
    out, from the queries' log-sum-exps.
    """
    _, heads, total, d = view.keys.shape
    q = view.queries.states[:1].view(1, heads, -1, total, d)[0].float() * view.place.scale  # H G T D
    k, lse = view.keys[0].float(), view.queries.lse[:1].view(1, heads, -1, total)[0]
    sums = torch.zeros(2, heads, q.shape[1], device=q.device, dtype=torch.float32)
    for back in range(period, total - start, period):
        at = torch.arange(start + back, total, device=q.device)
        for which in (0, 1):
            logits = torch.einsum("hgtd,htd->hgt", q[:, :, at], k[:, at - back + which])
            sums[which] += (logits - lse[:, :, at]).exp().sum(-1)
    return sums
