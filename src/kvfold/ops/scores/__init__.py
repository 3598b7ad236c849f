"""How much queries attend to each key: whole rows for the last few queries, column sums for all of them."""

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.scores import blocked, naive  # noqa: F401  (each registers itself)
from kvfold.ops.scores.naive import window_attention

__all__ = ["column_sums", "window_attention"]


def column_sums(
    q: Float[Tensor, "B Hq Q D"],
    k: Float[Tensor, "B H T D"],
    lse: Float[Tensor, "B Hq Q"],
    scale: float,
    start: Int[Tensor, "B H"],
    bias: Float[Tensor, "B H T"] | None = None,
) -> Float[Tensor, "B H T"]:
    """For each key, the attention that all queries of its group give it, summed; float32, memory linear in T.

    Query i's own token is key `start + i`: it sees that one and those before it.
    `lse` is what the forward pass left: the log-sum-exp of each query's logits, +inf for a query that must not count.
    """
    out: Tensor = select("column_sums", q)(q, k, lse, scale, start, bias)
    return out
