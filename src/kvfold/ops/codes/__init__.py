"""Attention over pages of codes: keys with a scale and a zero for each channel of a page, values with theirs for each
run of a token's channels. A table's planes: "keys" and "values" (N, P, W) as `packing` lays them, "key_scale" and
"key_zero" (N, D), "value_scale" and "value_zero" (N, P, C). Otherwise as `kvfold.ops.paged` has it.

On a processor with AVX-512 VNNI products are of integers: queries and weights are rounded to 16 bits, which moves an
answer by 0.06 % of what codes of 4 bits are off, 1.2 % at 8 bits (root mean square, Gaussian numbers; 0.26 % and 6 %
beside a channel 30 times as large). `KVFOLD_ISA=avx512` multiplies floats.
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.codes import cpu, gpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.dispatch import select

__all__ = ["attend_codes"]


def attend_codes(
    q: Float[Tensor, "B H G Q D"],
    table: Any,
    scale: float,
    *,
    bits: int,
    value_size: int,
    mass: str | None = None,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Any = None,
    position: str = "position",
    weights: bool = False,
) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
    """As `attend_pages`, over codes of `bits` bits; a value has `value_size` numbers.

    With `weights` the third is what each slot got of each query.
    """
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_codes", q)(
        q, table, scale, bits=bits, value_size=value_size, mass=mass, read=read, compact=compact, position=position,
        weights=weights,
    )  # fmt: skip
    return out
