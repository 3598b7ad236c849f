"""Attention over pages of vectors of which some numbers are kept. A table's planes: "keys" and "values" (N, P, K), the
kept numbers in the order of their channels, and "key_map" and "value_map" (N, P, W), a bit for each channel: see
`packing`. Otherwise as `kvfold.ops.paged` has it.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.dispatch import select
from kvfold.ops.sparse import cpu, gpu, naive  # noqa: F401  (each registers itself)

__all__ = ["attend_sparse"]


def attend_sparse(
    q: Float[Tensor, "B H G Q D"],
    table: Any,
    scale: float,
    *,
    value_size: int,
    mass: str | None = None,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Any = None,
    position: str = "position",
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
    """As `attend_pages`, over keys and values whose other numbers are 0; a value has `value_size` numbers.

    With `weights` the third is what each slot got of each query.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_sparse", q)(
        q, table, scale, value_size=value_size, mass=mass, read=read, compact=compact, position=position,
        weights=weights,
    )  # fmt: skip
    return out
