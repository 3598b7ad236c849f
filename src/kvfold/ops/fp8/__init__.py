"""Attention over numbers of eight bits (float8_e4m3fn). A table's planes: "keys" and "values" (N, P, W), the bytes of
the numbers, and "key_scale" and "value_scale" (N, P), what a token's are multiplied by. Otherwise as
`kvfold.ops.paged` has it.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.fp8 import gpu, naive  # noqa: F401  (each registers itself)

__all__ = ["attend_fp8"]


def attend_fp8(
    q: Float[Tensor, "B H G Q D"],
    table: Any,
    scale: float,
    *,
    mass: str | None = None,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Any = None,
    position: str = "position",
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
    """As `attend_pages`, over bytes and scales. With `weights` the third is what each slot got of each query."""
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_fp8", q)(
        q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
    )
    return out
