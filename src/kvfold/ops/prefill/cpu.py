"""Dense causal attention with a Numba kernel: as fast as torch's fused one, and it can leave the column sums."""

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.cpu import bits, fits, floats, use_threads, widths_fit
from kvfold.ops.dispatch import register
from kvfold.ops.prefill import naive, sdpa

TILE_BYTES = 3 << 18
"""Logits of a tile: three quarters of the second cache of most cores."""


@register("causal", "cpu", rank=20, fits=fits)
def causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sums: bool, fade: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    (b, hq, t, d), (h, dv) = q.shape, (k.shape[1], v.shape[3])
    if not (widths_fit(d, dv) and fits(k) and fits(v)) or t == 0:
        return sdpa.causal_cpu(q, k, v, scale, sums, fade)
    from kvfold.ops.prefill import cpu_kernels

    use_threads()
    out = torch.empty(b * h, hq // h, t, dv, dtype=torch.float32)
    lse = torch.empty(b * h, hq // h, t, dtype=torch.float32)
    parts = torch.zeros(b * h, cpu_kernels.PARTS, t if sums else 0, dtype=torch.float32)
    cpu_kernels.causal(
        floats(q).reshape(b * h, hq // h, t, d), panels(k), floats(v).reshape(-1), np.float32(scale), tile(t),
        naive.faded(t, fade, q.device).numpy(), out.numpy(), lse.numpy(), parts.numpy(),
    )  # fmt: skip
    total = parts.sum(1).view(b, h, t) if sums else None
    return out.to(q.dtype).view(b, hq, t, dv), lse.view(b, hq, t), total


def tile(keys: int) -> int:
    """Queries that are worked out together: a multiple of 6, which is what the product takes at once."""
    return max(6, min(48, TILE_BYTES // (4 * max(1, keys)) // 6 * 6))


def panels(k: Tensor) -> np.ndarray:
    """Keys (B, H, T, D) as float32 panels of STRIP keys, transposed: (B * H, panels, D, STRIP), flat."""
    from kvfold.ops.simd import STRIP

    b, h, t, d = k.shape
    count = -(-t // STRIP)
    padded = torch.zeros(b * h, count * STRIP, d, dtype=torch.float32)
    padded[:, :t] = k.reshape(b * h, t, d)
    return bits(padded.view(b * h, count, STRIP, d).transpose(2, 3)).reshape(-1)
