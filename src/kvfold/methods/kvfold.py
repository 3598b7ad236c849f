"""kvfold: keep what the end of the text reads most, fold the rest into it by the attention it would get (ours)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.decisions import Decision, Keep
from kvfold.formats import LOG_MASS
from kvfold.merges import absorb, at_home, log_mass, nearest, over_set
from kvfold.methods.base import Method, method
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top
from kvfold.views import LayerView, faded

SCORE = "kvfold_score"
UNSEEN = 1e-9
"""The mean attention of a token that nobody looked at: what folds into one would else outweigh all others."""


@method(
    "kvfold", title="kvfold: folding by attention", kind="merge",
    formula=r"""
        a_{h,t} = \sum_{g,i} e^{-(T-1-i)/(fT)} A_{h,g,i,t}, \quad
            s_{h,t} = a_{h,t} \lVert v_{h,t} \rVert^2
        e \to c = \mathrm{argmax}_{c \in C} \cos(k_e, k_c) \Leftrightarrow \cos(k_e, k_c) \ge \tau
        w_t = \frac{a_t}{\sum_{i \ge t} e^{-(T-1-i)/(fT)}}, \quad
            v_c \leftarrow \frac{\sum_{t \to c} w_t v_t}{\sum_{t \to c} w_t}, \quad
            \ln m_c \leftarrow \ln m_c + \ln \frac{\sum_{t \to c} w_t}{w_c}
    """,
    options={
        "recent": "share of the budget for the most recent tokens",
        "sinks": "first tokens that always stay",
        "fade": "how far back queries count (f), a share of the text: that far from its end 1/e; None: all alike",
        "threshold": "the cosine of two keys from which one token folds into the other; above 1: none does",
        "norm": 'what a value adds to its token\'s score: "square" of its norm, "norm", or "none"',
    },
)  # fmt: skip
@dataclass(frozen=True)
class KVFold(Method):
    """Keeps the tokens whose loss would change the answers most, and folds each of the others into its likest.

    The score of a token is the attention that it got, queries near the end of the text counting more, times the squared
    norm of its value. What goes folds into the kept token of its head with the most similar key: that one's value
    becomes the mean of both, weighted by the mean attention that each got, its key stays, and the log of the ratio
    of weights is added to its logits (the column `log_mass`), so that it gets the attention of all that it holds. Acts
    at the end of a prompt (of every chunk, if it is read in chunks); generated tokens are appended. On a further turn
    earlier scores fade and new ones are added. Query heads of a group add up their attention.
    This is the library's own method; docs/methods/kvfold.md has the ablations.
    """

    budget: Budget = 0.25
    recent: float = 0.5
    sinks: int = 4
    fade: float | None = 0.1
    threshold: float = 0.6
    norm: str = "square"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("recent", self.recent, 0.0, 1.0)
        check_int("sinks", self.sinks, 0)
        if self.fade is not None:
            check_number("fade", self.fade, 1e-6, math.inf)
        check_number("threshold", self.threshold, -1.0, 2.0)
        check_choice("norm", self.norm, ("square", "norm", "none"))

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """Column sums that fade."""
        return frozenset({faded(self.far)})

    @property
    def far(self) -> float:
        """`fade` as a number."""
        return math.inf if self.fade is None else float(self.fade)

    def after_prefill(self, view: LayerView) -> list[Decision] | None:
        if isinstance(self.budget, float) and self.budget == 1.0:
            return None
        attention = self.attention(view)
        counts = torch.minimum(view.budget(self.budget), view.count)
        kept = keep_top(view, self.worth(view, attention), counts, self.always(view, counts)).mask
        home, cosine = nearest(view.valid & ~kept, kept, view.keys)
        home = torch.where(cosine >= self.threshold, home, at_home(home))
        reach = self.reach(view)
        weight = (attention / reach).clamp(min=UNSEEN)
        total = over_set(weight, home)
        takes = home == at_home(home)
        columns = {
            SCORE: torch.where(takes, total * reach, attention),
            LOG_MASS: log_mass(view) + torch.where(takes, (total / weight).log(), 0.0),
        }
        return [absorb(view, home, takes.float(), weight / total), Keep(kept, columns)]

    def attention(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """What each token got so far, of queries that fade."""
        new = view.column_sums(self.far)
        if SCORE not in view.columns:
            return new
        seen = view.place.seen.to(new.device)
        past = torch.exp(-view.queries.valid.sum(1) / (self.far * seen))
        return new + view.columns[SCORE].masked_fill(~view.earlier, 0.0) * past[:, None, None]

    def worth(self, view: LayerView, attention: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
        """What the answers would lose with a token."""
        power = {"square": 2.0, "norm": 1.0, "none": 0.0}[self.norm]
        worth: Tensor = attention * view.values.float().norm(dim=-1).pow(power)
        return worth

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        """The newest tokens and the sinks, as far as the budget goes."""
        last = torch.minimum((counts * self.recent).long().clamp(min=1), counts)
        sinks = (counts - last).clamp(max=self.sinks)[..., None]
        return recent(view, last) | (view.rank < sinks)

    def reach(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """How many queries could look at each token, those far from the end counting less."""
        seen = view.place.seen.to(view.valid.device)[:, None, None]
        queries = (seen - view.positions).clamp(min=1)
        if self.fade is None:
            return queries.float()
        # 1 + r + ... + r^(n-1), for n queries from a token to the end.
        rate = -1.0 / (self.fade * seen.double())
        return (torch.expm1(rate * queries) / torch.expm1(rate)).float()
