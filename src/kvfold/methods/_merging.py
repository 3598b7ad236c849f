"""Methods that fold what another one drops into what it keeps: the inner method selects, a subclass merges."""

from dataclasses import dataclass

from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Decisions, Method, Pipeline, decided
from kvfold.methods.scored import Over
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep

SELECTING = ("evict", "pattern", "budget")
"""Kinds of methods that say what stays, and change nothing of it."""


@dataclass(frozen=True)
class Merging(Over[Method]):
    """`score` is the text of the method that selects, such as "h2o(recent=0.3)"; it acts when that one does."""

    budget: Budget = 0.25
    score: str = "h2o"

    lost = "decides in {}, too, where nothing is merged"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        self.inner  # noqa: B018  (raises for a score that can't be)

    def choosing(self, made: Method) -> Method:
        if isinstance(made, Pipeline) or "budget" not in made.info.options or made.info.kind not in SELECTING:
            raise ValueError(f"score={self.score!r} must be a method that selects tokens, such as 'h2o'")
        return made

    def loses(self, made: Method, event: str) -> bool:
        return event not in ("after_prefill", "after_decode") and super().loses(made, event)

    def selected(self, view: LayerView, event: str) -> Keep:
        """What the inner method keeps."""
        mask, columns = view.valid, dict[str, Tensor]()
        for decision in decided(getattr(self.inner, event)(view)):
            if not isinstance(decision, Keep | Drop):
                raise ValueError(f"score={self.score!r} must only say what stays, not {type(decision).__name__}")
            mask, columns = decision.staying(mask), {**columns, **decision.columns}
        return Keep(mask, columns)

    def merged(self, view: LayerView, keep: Keep) -> Decisions:
        """What is written and kept when `keep` is what stays."""
        raise NotImplementedError

    def after_prefill(self, view: LayerView) -> Decisions:
        return self.merged(view, self.selected(view, "after_prefill"))

    def after_decode(self, view: LayerView) -> Decisions:
        return self.merged(view, self.selected(view, "after_decode"))
