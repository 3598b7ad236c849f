"""Column sums a block of queries at a time: one product, one exp in place, one sum; never a T x T matrix."""

import torch
from torch import Tensor

from kvfold.ops.dispatch import register

BLOCK_ELEMENTS = 1 << 20
"""Logits held at once for each (row, head): 4 MB, about a core's share of cache."""


@register("column_sums", "blocked", rank=10)
def column_sums(q: Tensor, k: Tensor, lse: Tensor, scale: float, start: Tensor, bias: Tensor | None = None) -> Tensor:
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    group, starts = hq // h, start.tolist()
    block = max(16, min(256, BLOCK_ELEMENTS // max(1, group * t)))
    lse = lse.view(b, h, group, n)
    # A query that must not count may hold anything, NaN too.
    queries = (q.float().view(b, h, group, n, d) * scale).masked_fill((lse == torch.inf)[..., None], 0.0)
    keys = k.float().transpose(-1, -2)
    sums = torch.zeros(b, h, t, dtype=torch.float32, device=q.device)
    for row in range(b):
        for head in range(h):
            old = int(starts[row][head])
            for i in range(0, n, block):
                j = min(i + block, n)
                rows = queries[row, head, :, i:j].reshape(-1, d)  # (G, block) flattened
                shift = lse[row, head, :, i:j].reshape(-1, 1)
                probs = torch.addmm(-shift, rows, keys[row, head, :, : old + j])
                if bias is not None:
                    probs += bias[row, head, : old + j]
                future = torch.arange(i, j, device=q.device) > torch.arange(i, j, device=q.device)[:, None]
                probs.view(group, j - i, old + j)[..., old + i :].masked_fill_(future, -torch.inf)
                sums[row, head, : old + j] += probs.exp_().sum(0)
    return sums
