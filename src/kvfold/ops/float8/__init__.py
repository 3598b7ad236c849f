"""Attention over 8-bit floats on pages. A table's planes: "keys" and "values" (N, P, D), uint8, the bytes of e4m3 or of
e5m2, and "key_scale" and "value_scale" (N, P), float32, what a token's are multiplied by. Otherwise as
`kvfold.ops.paged` has it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.float8 import cpu, gpu, naive  # noqa: F401  (each registers itself)

__all__ = ["attend_float8"]


def attend_float8(
    q: Float[Tensor, "B H G Q D"],
    table: Any,
    scale: float,
    *,
    kind: torch.dtype,
    mass: str | None = None,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Any = None,
    position: str = "position",
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
    """As `attend_pages`, over bytes that are floats of `kind`, torch.float8_e4m3fn or torch.float8_e5m2.

    With `weights` the third is what each slot got of each query.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_float8", q)(
        q, table, scale, kind=kind, mass=mass, read=read, compact=compact, position=position, weights=weights
    )
    return out
