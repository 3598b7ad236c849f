"""TOVA: drop the token that the newest query looks at least (arXiv:2401.06104)."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored
from kvfold.scores.pooled import common
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

    No window, no sinks, no memory: the newest token competes like the others. Behind a stage that leaves each head
    other tokens, a token's mean is over the heads that hold it. Cuts after every chunk of a prompt that is read in
    chunks, which is a stricter method than one cut at its end.
    """

    asks = frozenset({"attention"})

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        return common(view, view.attention(1)[:, :, :, 0].mean(2))

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        # All heads keep the same tokens, so the smallest of their budgets is everyone's.
        return view.budget(self.budget).amin(1, keepdim=True).expand(-1, view.heads)

    after_decode = Scored.at_step
