"""Dense causal attention with torch's fused kernels, which also return the log-sum-exp."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvfold.ops.attend import attend, merge
from kvfold.ops.attend.sdpa import flash_cpu
from kvfold.ops.cpu import FLOATS, fits
from kvfold.ops.dispatch import register
from kvfold.ops.prefill import naive

Own = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Causal attention of as many queries as keys: (out, lse)."""


def behind(own: Own, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> tuple[Tensor, Tensor] | None:
    """The queries over their own keys, and over all that came before: both answers merge. None: not with a window.

    torch's kernels count from the first key, whatever the number of queries, and know no window.
    """
    (b, hq, n, d), (h, t) = q.shape, k.shape[1:3]
    if window and window < t:
        return None
    if n == t:
        return own(q, k, v, scale)
    first, second = own(q, k[:, :, t - n :], v[:, :, t - n :], scale), (k[:, :, : t - n], v[:, :, : t - n])
    out, lse = attend(q.reshape(b, h, hq // h * n, d), *second, scale)
    return merge([first, (out.reshape(b, hq, n, -1), lse.reshape(b, hq, n))])


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return flash_cpu(q, k, v, is_causal=True, scale=scale)


@register("causal", "sdpa", rank=10, fits=fits)
def causal_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sums: bool, shares: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    found = behind(_flash, q, k, v, scale, window) if k.shape[3] == v.shape[3] else None
    return naive.causal(q, k, v, scale, window, sums, shares) if found is None else (*found, None)


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The memory-efficient kernel: every dtype, and a log-sum-exp (padded to a multiple of 32 queries)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, compute_log_sumexp=True, is_causal=True, scale=scale
    )
    return out, lse[..., : q.shape[2]]


@register("causal", "sdpa-cuda", rank=10, fits=lambda q: q.device.type == "cuda" and q.dtype in FLOATS)
def causal_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sums: bool, shares: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    found = behind(_efficient, q, k, v, scale, window)
    return naive.causal(q, k, v, scale, window, sums, shares) if found is None else (*found, None)
