"""The most similar vector with the compiled kernel: each head as long as it is, and products stay in a core's cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.ops.alike import naive
from kvfold.ops.cpu import fits, floats, threads
from kvfold.ops.dispatch import register


@register("most_alike", "cpu", rank=10, fits=fits)
def most_alike(
    asking: Sequence[Tensor], others: Sequence[Tensor], asks: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    (b, h, n), m = asking[0].shape[:3], others[0].shape[2]
    if len(asking) > 2 or not all(map(fits, (*asking, *others))) or not b * h * n * m:
        return naive.most_alike(asking, others, asks, there)
    from kvfold.ops import _cpu

    best = torch.empty(b * h, n, dtype=torch.float32)
    first = torch.empty(b * h, n, dtype=torch.int64)
    left, right = ([floats(x).reshape(b * h, x.shape[2], -1) for x in both] for both in (asking, others))
    also, as_well = (left[1], right[1]) if len(asking) == 2 else (None, None)
    ask, answer = (x.expand(b, h).reshape(-1).to(torch.int64).contiguous().numpy() for x in (asks, there))
    _cpu.most_alike(left[0], right[0], also, as_well, ask, answer, threads(), best.numpy(), first.numpy())
    return best.view(b, h, n), first.view(b, h, n)
