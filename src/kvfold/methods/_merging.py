"""Methods that fold what another one drops into what it keeps: the inner method selects, a subclass merges."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Decisions, Method, Pipeline, decided
from kvfold.methods.registry import parse
from kvfold.methods.scored import EVENTS, without_budget
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

SELECTING = ("evict", "pattern", "budget")
"""Kinds of methods that say what stays, and change nothing of it."""


@dataclass(frozen=True)
class Merging(Method):
    """`score` is the text of the method that selects, such as "h2o(recent=0.3)"; it acts when that one does."""

    budget: Budget = 0.25
    score: str = "h2o"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        self.inner  # noqa: B018  (raises for a score that can't be)

    @cached_property
    def inner(self) -> Any:
        """The method that selects. Raises ValueError for one that does more, or that sets a budget of its own."""
        made = parse(self.score)
        if isinstance(made, Pipeline) or "budget" not in made.info.options or made.info.kind not in SELECTING:
            raise ValueError(f"score={self.score!r} must be a method that selects tokens, such as 'h2o'")
        if "budget=" in self.score:
            raise ValueError(f"score={self.score!r} must leave the budget to {type(self).__name__}")
        own = [event for event in EVENTS if event not in ("after_prefill", "after_decode") and made.listens(event)]
        if own:
            raise ValueError(f"score={self.score!r} decides in {', '.join(own)}, too, where nothing is merged")
        return replace(made, budget=self.budget)  # type: ignore[type-var]

    def bind(self, model: Any) -> "Merging":
        bound = self.inner.bind(model)
        return self if bound is self.inner else replace(self, score=without_budget(bound))

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """What the inner method asks for."""
        return frozenset(self.inner.asks)

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether the inner method reads at compact positions."""
        return bool(self.inner.compact)

    def listens(self, event: str) -> bool:
        return super().listens(event) if event != "after_decode" else self.inner.listens(event)

    def selected(self, view: LayerView, event: str) -> Keep:
        """What the inner method keeps."""
        mask, columns = view.valid, dict[str, Tensor]()
        for decision in decided(getattr(self.inner, event)(view)):
            if not isinstance(decision, Keep):
                raise ValueError(f"score={self.score!r} must only say what stays, not {type(decision).__name__}")
            mask, columns = mask & decision.mask, {**columns, **decision.columns}
        return Keep(mask, columns)

    def merged(self, view: LayerView, keep: Keep) -> Decisions:
        """What is written and kept when `keep` is what stays."""
        raise NotImplementedError

    def after_prefill(self, view: LayerView) -> Decisions:
        return self.merged(view, self.selected(view, "after_prefill"))

    def after_decode(self, view: LayerView) -> Decisions:
        return self.merged(view, self.selected(view, "after_decode"))
