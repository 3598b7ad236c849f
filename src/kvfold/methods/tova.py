"""TOVA: drop the token that the newest query looks at least (arXiv:2401.06104)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored
from kvfold.views import LayerView


@method(
    "tova", title="TOVA: Token Omission Via Attention", paper="2401.06104", kind="evict",
    formula=r"""
        s_t = \frac{1}{HG}\sum_{h,g} A_{h,g,n,t}
        K = \mathrm{top}_b(s)
    """,
)  # fmt: skip
@dataclass(frozen=True)
class TOVA(Scored):
    """Attention of the last query alone, its mean over all heads: one choice for a layer, after every forward.

    No window, no sinks, no memory: the newest token competes like the others. Cuts after every chunk of a prompt
    that is read in chunks, which is a stricter method than one cut at its end.
    """

    asks = frozenset({"attention"})

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        return view.attention(1).mean((1, 2, 3))[:, None].expand_as(view.valid)

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        # All heads keep the same tokens, so the smallest of their budgets is everyone's.
        return view.budget(self.budget).amin(1, keepdim=True).expand(-1, view.heads)

    after_decode = Scored.at_step
