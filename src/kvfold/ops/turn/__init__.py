"""Vectors that turn with positions, as rotary embeddings turn them (RoPE, arXiv:2104.09864)."""

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.turn import cpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.turn.pairs import Pairs, pairs_of

__all__ = ["Pairs", "pairs_of", "turn"]


def turn(x: Float[Tensor, "B H T D"], steps: Int[Tensor, "B H T"], pairs: Pairs) -> Float[Tensor, "B H T D"]:
    """Vectors of position p become those of position p + `steps`, in the dtype of `x`; worked out in float32.

    `pairs`: which channels turn together, and by how much for each step.
    """
    found: Tensor = select("turn", x)(x, steps, pairs)
    return found
