"""How much queries attend to each key: whole rows for the last few queries, column sums for all of them."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.scores import blocked, cpu, gpu, naive  # noqa: F401  (each registers itself)

__all__ = ["column_sums", "window_attention"]


def window_attention(
    q: Float[Tensor, "B H G W D"],
    k: Float[Tensor, "B H T D"],
    scale: float,
    seen: Bool[Tensor, "B H W T"],
    bias: Float[Tensor, "B H T"] | None = None,
    lse: Float[Tensor, "B H G W"] | None = None,
) -> Float[Tensor, "B H G W T"]:
    """Attention probabilities of chosen queries over all keys, float32.

    `seen` says which keys a query sees, `bias` is added to the logits; a query that sees nothing gives zeros. `lse`:
    the log-sum-exp of all that each query saw, where these keys are a part of it.
    """
    out: Tensor = select("window_attention", q)(q, k, scale, seen, bias, lse)
    return out


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
