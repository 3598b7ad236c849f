"""The most similar vector with a Numba kernel: each head as long as it is, and the products stay in a core's cache."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.alike import naive
from kvfold.ops.cpu import fits, floats, use_threads
from kvfold.ops.dispatch import register
from kvfold.ops.prefill.cpu import panels, tile


@register("most_alike", "cpu", rank=10, fits=fits)
def most_alike(
    asking: Sequence[Tensor], others: Sequence[Tensor], asks: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    (b, h, n), m = asking[0].shape[:3], others[0].shape[2]
    if len(asking) > 2 or not all(map(fits, (*asking, *others))) or not b * h * n * m:
        return naive.most_alike(asking, others, asks, there)
    from kvfold.ops.alike import cpu_kernels

    use_threads()
    best, first = torch.empty(b * h, n, dtype=torch.float32), torch.empty(b * h, n, dtype=torch.int64)
    left = [floats(x).reshape(b * h, n, -1) for x in asking]
    right = [panels(y) for y in others]
    if len(left) == 1:
        left.append(np.empty((b * h, 0, 0), np.float32))
        right.append(np.empty(0, np.float32))
    counts = [x.expand(b, h).reshape(-1).to(torch.int64).contiguous().numpy() for x in (asks, there)]
    cpu_kernels.most_alike(*left, *right, *counts, m, tile(m), best.numpy(), first.numpy())
    return best.view(b, h, n), first.view(b, h, n)
