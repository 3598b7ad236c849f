"""Methods that rank tokens: a score, what always stays, and how many; wrappers share a budget out over any of them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Compound, Decisions, Method
from kvfold.methods.events import EVENTS
from kvfold.methods.registry import parse
from kvfold.scores import drop_lowest, keep_top
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep

M = TypeVar("M", bound=Method)


@dataclass(frozen=True)
class Scored(Method):
    """Keeps the tokens with the highest `scores`, as many as `counts` says, those of `always` first of all.

    A subclass gives `scores`, and the others where the default is not its own. It acts on prompts; one that acts on
    generated tokens too sets `after_decode = Scored.at_step`.
    """

    budget: Budget = 0.25
    lone: ClassVar[bool] = False
    """Whether at a step a token's score depends on no other token: on what the step's softmax gave it, which all share,
    and on its own columns."""

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """Importance, float32; what stands at empty slots does not matter."""
        raise NotImplementedError

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        """How many tokens each (row, head) may keep."""
        return view.budget(self.budget)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"] | None:
        """Tokens that stay whatever their score, as far as `counts` goes: sinks, a recent window."""
        return None

    def carried(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Mapping[str, Tensor]:
        """Columns that the kept tokens carry on, such as an accumulated score."""
        return {}

    def after_prefill(self, view: LayerView) -> Keep:
        scores = self.scores(view)
        counts = self.counts(view, scores)
        kept = keep_top(view, scores, counts, always=self.always(view, counts))
        return Keep(kept.mask, self.carried(view, scores))

    def at_step(self, view: LayerView) -> Keep | Drop:
        """What `after_prefill` keeps, by what goes: after a generated token few do."""
        scores = self.scores(view)
        counts = self.counts(view, scores)
        return drop_lowest(view, scores, counts, self.always(view, counts), self.carried(view, scores))


def without_budget(inner: Method) -> str:
    """A method's text, its budget left to whoever wraps it."""
    options = (f"{o.name}={getattr(inner, o.name)!r}" for o in fields(inner) if o.name != "budget")  # type: ignore[arg-type]
    return f"{inner.info.slug}({', '.join(options)})"


SINKS = 4
"""First tokens that share a budget without room for them and a method's window: without any, models babble."""


def both_ends(counts: Int[Tensor, "*B"], window: int, sinks: int = 0) -> tuple[Int[Tensor, "*B"], Int[Tensor, "*B"]]:
    """How many of the first and of the last tokens always stay, of `counts` in all: `sinks` and `window`.

    Where they leave no room for `SINKS` more (half the window, if that is less), the first get half of all, at most
    SINKS, and the last the rest: a window that uses up the budget of a short prompt would leave no sink.
    """
    short = counts < window + max(sinks, min(SINKS, window // 2))
    first = torch.where(short, (counts // 2).clamp(max=max(sinks, SINKS)), sinks)
    return first, torch.where(short, counts - first, window)


def exempt(view: LayerView, counts: Int[Tensor, "B H"], window: int, sinks: int = 0) -> Bool[Tensor, "B H T"]:
    """The first and the last tokens that stay whatever their score, see `both_ends`."""
    first, last = both_ends(counts.to(view.valid.device), window, sinks)
    return recent(view, last) | (view.valid & (view.rank < first[..., None]))


def recent(view: LayerView, window: int | Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
    """The last `window` tokens of each (row, head)."""
    return view.valid & (view.rank >= (view.count - window)[..., None])


class Over(Compound, Generic[M]):
    """A method over another one, `inner`, whose text is `score`: it acts when that one does.

    What it does not do by itself is the inner method's; one that does what would be lost here is refused.
    """

    score: str
    budget: Budget
    lost = "decides in {}, which would be lost"
    """Why a method is refused that does something at these events."""

    @cached_property
    def inner(self) -> M:
        """The other method, with this one's budget. Raises ValueError for one that can't be, or sets its own budget."""
        made = self.choosing(parse(self.score))
        if "budget=" in self.score:
            raise ValueError(f"score={self.score!r} must leave the budget to {type(self).__name__}")
        if own := [event for event in EVENTS if self.loses(made, event)]:
            raise ValueError(f"score={self.score!r} {self.lost.format(', '.join(own))}")
        return replace(made, budget=self.room)  # type: ignore[type-var]

    @property
    def room(self) -> Budget:
        """The other's budget."""
        return self.budget

    def choosing(self, made: Method) -> M:
        """The method that was made. Raises ValueError for one that does not choose tokens as it must here."""
        raise NotImplementedError

    def loses(self, made: Method, event: str) -> bool:
        """Whether something that a method does at an event would not be done here."""
        return made.listens(event) and not EVENTS[event].wrapped

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self.inner,)

    def bind(self, model: Any) -> "Over[M]":
        bound = self.inner.bind(model)
        return self if bound is self.inner else replace(self, score=without_budget(bound))  # type: ignore[type-var]

    def listens(self, event: str) -> bool:
        return self.inner.listens(event) if event == "after_decode" else super().listens(event)


@dataclass(frozen=True)
class Wrapper(Scored, Over[Scored]):
    """A way to share a budget, over any method that ranks tokens: `score` is its text, such as "snapkv(window=16)".

    Scores, what always stays and when it acts are the inner method's; `counts` are the wrapper's. The inner
    method's own `counts` (at the wrapper's budget) are there to start from, so that wrappers can be nested.
    """

    score: str = "snapkv"

    lost = "decides by itself in {}, which no ranking passes on"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner  # noqa: B018  (raises for a score that can't be)

    def choosing(self, made: Method) -> Scored:
        if not isinstance(made, Scored):
            raise ValueError(f"score={self.score!r} must be a method that ranks tokens, such as 'snapkv' or 'h2o'")
        return made

    def loses(self, made: Method, event: str) -> bool:
        """Its scores must say all of what it does after a pass."""
        if event not in ("after_prefill", "after_decode"):
            return super().loses(made, event)
        ranking = Scored.after_prefill, Scored.at_step, Wrapper.after_decode, getattr(Method, event)
        return getattr(type(made), event) not in ranking

    def must_share_evenly(self) -> None:
        """Raise ValueError for a `score` that shares a budget by itself, for a wrapper whose shares replace its own."""
        inner = self.inner
        if isinstance(inner, Wrapper) and type(inner).counts is not Wrapper.counts:
            raise ValueError(
                f"score={self.score!r} shares the budget by itself, which {self.info.slug} would not heed: give "
                f"{self.info.slug} what ranks the tokens ({inner.score!r})"
            )

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        return self.inner.scores(view)

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        return self.inner.counts(view, scores)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"] | None:
        return self.inner.always(view, counts)

    def carried(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Mapping[str, Tensor]:
        return self.inner.carried(view, scores)

    def after_decode(self, view: LayerView) -> Decisions:
        own = type(self).after_prefill is not Scored.after_prefill
        return self.after_prefill(view) if own else self.at_step(view)


__all__ = ["SINKS", "Over", "Scored", "Wrapper", "both_ends", "exempt", "recent", "without_budget"]
