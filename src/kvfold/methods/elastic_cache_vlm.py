"""Elastic Cache: what is unimportant joins the nearest important token of the text (arXiv:2407.18121)."""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.methods._elastic import MASSES, at_fixed_place, ends, into_buckets
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int
from kvfold.scores import keep_top
from kvfold.scores.pooled import common
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Drop, Keep

SCORE = "elastic_cache_score"


@method(
    "elastic-cache-vlm", title="Elastic Cache", paper="2407.18121", kind="merge",
    formula=r"""
        I_t = \sum_{h,g,i} A_{h,g,i,t}, \quad C = \lbrace 1, \dots, a, T \rbrace \cup \mathrm{top}_{b-a-1}(I)
        B_c = \lbrace t : c = \arg\min_{u \in C} |t - u| \rbrace
        k_c \leftarrow \frac{1}{|B_c|} \sum_{t \in B_c} k_t, \quad v_c \leftarrow \frac{1}{|B_c|} \sum_{t \in B_c} v_t
    """,
    options={
        "sinks": "first tokens that always stay (a)",
        "distance": "how far from the end of the prompt's kept tokens one goes for each that is generated",
        "mass": 'what tells a query how many tokens a bucket stands for: "convex" (nothing) or "counted" (ours)',
    },
)  # fmt: skip
@dataclass(frozen=True)
class ElasticCache(Method):
    """Anchors are the tokens with the most attention of all queries and heads; the others join the nearest anchor.

    All heads of a layer have the same anchors and buckets; the first `sinks` tokens and the last are anchors that take
    nothing in (as in the code: a sink that is averaged with its neighbours is none, and short texts fall apart). On a
    further turn importance adds up, and what was merged merges again. In decoding nothing is scored or merged: a
    token goes for each that comes, `distance` from the end of what the prompt left (the middle, where that is
    shorter).
    Differs from the paper: its code compares `argsort` itself with a number, which keeps other tokens than the most
    important, and adds up keys one slot off; here ranks are ranks. Where there are no other anchors, nothing merges. In
    decoding the budget stays that of the prompt, and does not grow with the text. A remainder of less than a token a
    head is left unused. Not the method of the same name for diffusion models.
    """

    budget: Budget = 0.25
    sinks: int = 1
    distance: int = 25
    mass: str = "convex"

    asks = frozenset({"column_sums"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("sinks", self.sinks, 0)
        check_int("distance", self.distance, 1)
        check_choice("mass", self.mass, MASSES)

    @property
    def whole(self) -> bool:
        """Whether nothing is ever to go."""
        return is_all(self.budget)

    def shared(self, view: LayerView) -> Int[Tensor, "B H"]:
        """The budget, as many tokens for each head of a row."""
        return view.budget(self.budget).amin(1, keepdim=True).expand(-1, view.heads)

    def after_prefill(self, view: LayerView) -> list[Decision] | None:
        if self.whole:
            return None
        received = view.column_sums()
        if SCORE in view.columns:
            received = received + view.columns[SCORE]
        importance, counts = common(view, received), self.shared(view)
        both = ends(view, counts, self.sinks)
        kept = keep_top(view, importance, counts, always=both)
        return into_buckets(view, Keep(kept.mask, {SCORE: importance}), self.mass, both)

    def after_decode(self, view: LayerView) -> Drop | None:
        if self.whole:
            return None
        counts = self.shared(view)
        return at_fixed_place(view, counts, (view.count - counts).clamp(min=0), self.distance, self.sinks)
