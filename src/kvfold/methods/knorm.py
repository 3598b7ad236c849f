"""Key norms: keep the keys of lowest norm (arXiv:2406.11430)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored
from kvfold.views import LayerView

BITS = 14
"""Of a norm that count: what differs by rounding alone, as the norms of keys that a model normalises, is a tie."""


@method(
    "knorm", title="L2 norm of keys", paper="2406.11430", kind="evict",
    formula=r"""
        s_{h,t} = -\lVert k_{h,t} \rVert_2
        K_h = \mathrm{top}_b(s_h)
    """,
)  # fmt: skip
@dataclass(frozen=True)
class KNorm(Scored):
    """The norm of a key, the lowest first: such keys tend to get the most attention. No attention is looked at.

    Nothing always stays: the newest token competes like the others. Acts at the end of a prompt; generated tokens are
    appended. Models that normalise keys (Qwen 3, Gemma 3) leave little for norms to say.
    Differs from the paper: every layer is cut. The authors' code can leave the first two as they are, where norm and
    attention go together the least, and then holds more than the budget.
    """

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        mantissa, exponent = torch.frexp(view.keys.float().norm(dim=-1))
        return -torch.ldexp((mantissa * (1 << BITS)).round(), exponent - BITS)
