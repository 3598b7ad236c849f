"""KeyDiff: keep the keys that are least like the others (arXiv:2504.15364)."""

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored
from kvfold.views import LayerView


@method(
    "keydiff", title="KeyDiff", paper="2504.15364", kind="evict",
    formula=r"""
        \mu_h = \frac{1}{T}\sum_t \frac{k_{h,t}}{\lVert k_{h,t} \rVert}, \quad s_{h,t} = -\cos(k_{h,t}, \mu_h)
        K_h = \mathrm{top}_b(s_h)
    """,
)  # fmt: skip
@dataclass(frozen=True)
class KeyDiff(Scored):
    """The cosine of a key to the mean direction of its head's keys, the lowest first; no attention is looked at.

    Keys are compared as the cache holds them, after RoPE. Nothing always stays: the newest token competes like the
    others, and sinks, whose keys point elsewhere, stay by themselves. Acts at the end of a prompt; generated tokens
    are appended. With a `prefill_chunk` it chooses after every chunk, which is how the paper reads a long prompt under
    a limit (blocks of tokens, each scored together with what was kept).
    """

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        # In float64: two tokens are equally like their mean, and rounding must not say which stays.
        keys = F.normalize(view.keys.double(), dim=-1).masked_fill(~view.valid[..., None], 0.0)
        mean = keys.sum(2, keepdim=True)  # its length does not matter
        return -(keys * F.normalize(mean, dim=-1)).sum(-1).float()
