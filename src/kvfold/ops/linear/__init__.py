"""A linear layer: what is multiplied, and the ways to do it for a few rows."""

from jaxtyping import Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.linear import cpu, naive  # noqa: F401  (each registers itself)

__all__ = ["linear"]


def linear(x: Float[Tensor, "N K"], weight: Float[Tensor, "M K"], bias: Float[Tensor, "M"] | None) -> Tensor:
    """x weight' + bias, (N, M) in x's dtype, which is the weights' too; summed in float32."""
    out: Tensor = select("linear", weight)(x, weight, bias)
    return out
