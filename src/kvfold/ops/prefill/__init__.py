"""Dense causal attention of a prompt over itself, with its log-sum-exp, in memory linear in T."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.prefill import cpu, naive, packed, sdpa  # noqa: F401  (each registers itself)

__all__ = ["causal", "causal_admitted", "causal_rows"]


def causal(
    q: Float[Tensor, "B Hq Q D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T Dv"],
    scale: float,
    *,
    window: int = 0,
    sums: bool = False,
    shares: Float[Tensor, " Q"] | None = None,
) -> tuple[Float[Tensor, "B Hq Q Dv"], Float[Tensor, "B Hq Q"], Float[Tensor, "B H T"] | None]:
    """The queries are those of the last Q keys: query i sees keys 0..T - Q + i, or with a `window` the last so many.

    Query head h reads KV head h // (Hq / H). (out, lse in float32, column sums). The column sums are what each key got
    of all queries of its group, as `column_sums` gives them; None unless they are asked for (`sums`) and the version
    can leave them at no more than a look. `shares`: what each query counts in them, None: 1.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = select("causal", q)(q, k, v, scale, window, sums, shares)
    return out


def causal_rows(
    q: Float[Tensor, "B Hq Q D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T Dv"],
    valid: Bool[Tensor, "B T"],
    scale: float,
    *,
    window: int = 0,
    sums: bool = False,
    shares: Float[Tensor, "B Q"] | None = None,
) -> tuple[Float[Tensor, "B Hq Q Dv"], Float[Tensor, "B Hq Q"], Float[Tensor, "B H T"] | None]:
    """`causal` with padding: each row alone, without it, so that no T x T mask is made. A padded query: 0 and -inf.

    A `window` counts tokens, not columns: the two are the same where no padding stands between tokens.
    """
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    total = torch.zeros(k.shape[:3], device=q.device, dtype=torch.float32) if sums else None
    for row in range(q.shape[0]):
        here, asking = valid[row].nonzero()[:, 0], valid[row, -q.shape[2] :].nonzero()[:, 0]
        if len(asking):
            rows, each = slice(row, row + 1), None if shares is None else shares[row, asking]
            found = causal(
                q[rows, :, asking], k[rows, :, here], v[rows, :, here], scale, window=window, sums=sums, shares=each
            )
            out[rows, :, asking], lse[rows, :, asking] = found[:2]
            if total is None or found[2] is None:
                total = None
            else:
                total[rows, :, here] = found[2]
    return out, lse, total


def causal_admitted(
    q: Float[Tensor, "B Hq T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T Dv"],
    admitted: Bool[Tensor, "B H T"],
    scale: float,
) -> tuple[Float[Tensor, "B Hq T Dv"], Float[Tensor, "B Hq T"]]:
    """`causal`, but query i sees only those of the keys before it that are `admitted`, and always its own.

    Padding is not admitted: what a padded query gets has no meaning, and nobody else sees it.
    """
    out: tuple[Tensor, Tensor] = select("causal_admitted", q)(q, k, v, admitted, scale)
    return out
