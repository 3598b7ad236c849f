"""TOVA: drop the token that the newest query looks at least (arXiv:2401.06104)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.decisions import Keep
from kvfold.methods.base import Method, method
from kvfold.scores import keep_top
from kvfold.views import LayerView


@method("tova", title="TOVA: Token Omission Via Attention", paper="2401.06104", kind="evict")
@dataclass(frozen=True)
class TOVA(Method):
    """Attention of the last query alone, its mean over all heads: one choice for a layer, after every forward.

    No window, no sinks, no memory: the newest token competes like the others. Cuts after every chunk of a prompt
    that is read in chunks, which is a stricter method than one cut at its end.
    """

    budget: Budget = 0.25

    asks = frozenset({"attention"})

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def after_prefill(self, view: LayerView) -> Keep:
        asked = view.attention(1).mean((1, 2, 3))[:, None].expand_as(view.valid)  # B H T, the same for all H
        # All heads keep the same tokens, so the smallest of their budgets is everyone's.
        budget = view.budget(self.budget).amin(1, keepdim=True).expand(-1, view.heads)
        return keep_top(view, asked, budget)

    after_decode = after_prefill
