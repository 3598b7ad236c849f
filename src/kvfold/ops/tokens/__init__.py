"""Attention over tokens in codes, each with scales of its own, so that any may be read, dropped or written alone.

A table's planes: "keys" and "values" (N, P, W) as `kvfold.ops.codes.packing` lays them, "key_scale" and "value_scale"
(N, P, C), and "key_zero" and "value_zero" (N, P, C) of codings without levels. Otherwise as `kvfold.ops.paged` has it.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.tokens import cpu, gpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.tokens.coding import Coding

__all__ = ["Coding", "attend_tokens"]


def attend_tokens(
    q: Float[Tensor, "B H G Q D"],
    table: Any,
    scale: float,
    *,
    keys: Coding,
    values: Coding,
    mass: str | None = None,
    read: Bool[Tensor, "B H T"] | None = None,
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
    """As `attend_pages`, over what the codes of `keys` and `values` stand for.

    With `weights` the third is what each slot got of each query.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_tokens", q)(
        q, table, scale, keys=keys, values=values, mass=mass, read=read, weights=weights
    )
    return out
