"""H2O: keep heavy hitters and a recent window, one eviction per generated token (arXiv:2306.14048)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.decisions import Keep
from kvfold.methods.base import Method, method
from kvfold.options import check_number
from kvfold.scores import keep_top
from kvfold.views import LayerView

SCORE = "h2o_score"


@method("h2o", title="H2O: Heavy-Hitter Oracle", paper="2306.14048", kind="evict")
@dataclass(frozen=True)
class H2O(Method):
    """The tokens that got the most attention from all queries so far, and the most recent ones.

    A column carries each token's accumulated attention. `recent` is the share of the budget for the recent
    window (the paper: half).
    Differs from the paper: the query heads of a group add up, so that one KV head keeps one set of tokens. The
    prompt is cut once at its end (in chunked prefill after every chunk, which is stricter than the paper).
    """

    budget: Budget = 0.25
    recent: float = 0.5

    asks = frozenset({"column_sums", "attention"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("recent", self.recent, 0.0, 1.0)

    def after_prefill(self, view: LayerView) -> Keep:
        return self._keep(view, view.column_sums())

    def after_decode(self, view: LayerView) -> Keep:
        return self._keep(view, view.attention(view.new).sum((2, 3)))

    def _keep(self, view: LayerView, attention: Float[Tensor, "B H T"]) -> Keep:
        score = attention + view.columns[SCORE] if SCORE in view.columns else attention
        budget = view.budget(self.budget)
        window = (budget * self.recent).floor().to(torch.int64)
        recent = view.valid & (view.rank >= (view.count - window)[..., None])
        return Keep(keep_top(view, score, budget, always=recent).mask, {SCORE: score})
