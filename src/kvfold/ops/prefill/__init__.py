"""Dense causal attention of a prompt over itself, with its log-sum-exp, in memory linear in T."""

from jaxtyping import Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.prefill import naive, sdpa  # noqa: F401  (each registers itself)

__all__ = ["causal"]


def causal(
    q: Float[Tensor, "B Hq T D"], k: Float[Tensor, "B H T D"], v: Float[Tensor, "B H T Dv"], scale: float
) -> tuple[Float[Tensor, "B Hq T Dv"], Float[Tensor, "B Hq T"]]:
    """Query i sees keys 0..i; query head h reads KV head h // (Hq / H). Returns (out, lse), lse in float32."""
    out: tuple[Tensor, Tensor] = select("causal", q)(q, k, v, scale)
    return out
