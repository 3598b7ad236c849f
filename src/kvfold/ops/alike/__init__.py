"""For each of some vectors the most similar one of others."""

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.ops.alike import cpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.dispatch import select

__all__ = ["most_alike"]


def most_alike(
    asking: Sequence[Float[Tensor, "B H N _"]],
    others: Sequence[Float[Tensor, "B H M _"]],
    asks: Int[Tensor, "B H"],
    there: Int[Tensor, "B H"],
) -> tuple[Float[Tensor, "B H N"], Int[Tensor, "B H N"]]:
    """How similar, and which: of each (row, head) the first `asks` ask, the first `there` of `others` answer.

    Similar is the dot product; of several kinds of vectors the product of theirs, each negative one counted as 0.
    The earlier where they tie; -inf and 0 for those that don't ask or get no answer. Float32, memory linear in N + M.
    Vectors that take part must be finite.
    """
    found: tuple[Tensor, Tensor] = select("most_alike", asking[0])(asking, others, asks, there)
    return found
