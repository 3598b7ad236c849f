"""Dense causal attention of a prompt over itself, with its log-sum-exp, in memory linear in T."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.prefill import naive, sdpa  # noqa: F401  (each registers itself)

__all__ = ["causal", "causal_rows"]


def causal(
    q: Float[Tensor, "B Hq T D"], k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T Dv"], scale: float
) -> tuple[Float[Tensor, "B Hq T Dv"], Float[Tensor, "B Hq T"]]:
    """Query i sees keys 0..i; query head h reads KV head h // (Hq / H). Returns (out, lse), lse in float32."""
    out: tuple[Tensor, Tensor] = select("causal", q)(q, k, v, scale)
    return out


def causal_rows(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T Dv"],
    valid: Bool[Tensor, "B T"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq T Dv"], Float[Tensor, "B Hq T"]]:
    """`causal` with padding: each row alone, without it, so that no T x T mask is made. A padded query: 0 and -inf."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    for row in range(q.shape[0]):
        here = valid[row].nonzero()[:, 0]
        if len(here):
            rows = slice(row, row + 1)
            out[rows, :, here], lse[rows, :, here] = causal(q[rows, :, here], k[rows, :, here], v[rows, :, here], scale)
    return out, lse
