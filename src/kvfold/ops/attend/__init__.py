"""Attention of a few queries over stored tokens, and the merge of partial answers."""

from jaxtyping import Float
from torch import Tensor

from kvfold.ops.attend import naive, sdpa  # noqa: F401  (each registers itself)
from kvfold.ops.attend.naive import merge
from kvfold.ops.dispatch import select

__all__ = ["attend", "merge"]


def attend(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T Dv"],
    scale: float,
    bias: Float[Tensor, "B H #Q T"] | None = None,
) -> tuple[Float[Tensor, "B H Q Dv"], Float[Tensor, "B H Q"]]:
    """Softmax attention with its log-sum-exp (float32). Not causal: `bias` (float32, -inf: not seen) is all there is.

    The query heads of a group go into Q: they read the same keys. A query that sees no token gives 0 and -inf.
    """
    out: tuple[Tensor, Tensor] = select("attend", q)(q, k, v, scale, bias)
    return out
