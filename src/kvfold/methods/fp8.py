"""FP8: every key and value as 8-bit floats, e4m3 (Micikevicius et al., arXiv:2209.05433)."""

from dataclasses import dataclass

from kvfold.formats import Format, Fp8
from kvfold.methods.base import Method, method


@method(
    "fp8", title="FP8: keys and values in e4m3", paper="2209.05433", kind="quantize",
    formula=r"""
        \hat x = s \cdot \mathrm{e4m3}(x / s), \quad s = \max_d |x_d| / 448
    """,
)  # fmt: skip
@dataclass(frozen=True)
class Float8(Method):
    """Keeps every token, its key and its value as e4m3 codes with a float32 scale each.

    Behind a method that drops or merges it says in what format the rest is held: "snapkv(budget=0.25) | fp8". A
    prompt is attended in full precision before it is stored; later tokens read the codes.
    Differs from the paper: that is about training and inference of whole networks, with a scale for each tensor; a
    scale for each token and head costs 4 bytes and lets no outlier spoil the others.
    """

    @property
    def format(self) -> Format:  # type: ignore[override]
        """Codes and scales, token by token."""
        return Fp8()
