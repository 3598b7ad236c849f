"""kvfold: keep what the end of the text reads most, fold the rest into it by the attention it would get (ours)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.artefacts.probed import probe
from kvfold.budgets import Budget, check_budget, is_all
from kvfold.merges import fold_by_attention, refit
from kvfold.methods._calibrated import Table, check_table, measured, query_heads, table_of
from kvfold.methods._intervals import AtIntervals, check_interval
from kvfold.methods._repeated import repeated
from kvfold.methods.base import Decisions, method
from kvfold.methods.headkv import Shares, by_heads
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top
from kvfold.scores.reach import reach
from kvfold.scores.smoothed import smoothed
from kvfold.views import LayerView, PromptView, Queries, Requests, faded
from kvfold.views.decisions import Amend, Keep

SCORE, QUERIES, WORTH, AGAIN = "kvfold_score", "kvfold_queries", "kvfold_worth", "kvfold_again"
"""Columns: the attention that a token got, of how many queries; for `quality="best"` worth, and what it got then."""
POOL = 1.25
"""The part of the budget that heads share by their scores is 1 / POOL, HeadKV's `beta`."""
LAST = "kvfold_last"
"""In the context of a pass: each layer's last queries, for a decision after the prompt."""
REPEATED, QUOTED = 2000, 8
"""Of a second reading: tokens that are repeated at a time, and those before them that are quoted."""


@method(
    "kvfold", title="kvfold: folding by attention", kind="merge",
    formula=r"""
        a_{h,t} = \sum_{g,i} e^{-(T-1-i)/(fT)} A_{h,g,i,t}, \quad
            p_{h,t} = \max_{|u-t| \le k/2} \max_{g,\, i \ge T-w} A_{h,g,i,u} \lVert v_{h,u} \rVert^2
        s_{h,t} = \frac{a_{h,t} \lVert v_{h,t} \rVert^2}{\sum_u a_{h,u} \lVert v_{h,u} \rVert^2}
            + c \frac{p_{h,t}}{\sum_u p_{h,u}}
        e \to c = \mathrm{argmax}_{c \in C} \cos(k_e - \bar k, k_c - \bar k) \Leftrightarrow
            \cos \ge \tau \wedge (w_c \ge w_e \vee \cos \ge 0.95)
        w_t = \frac{a_t}{\sum_{i \ge t} e^{-(T-1-i)/(fT)}}, \quad
            v_c \leftarrow \frac{\sum_{t \to c} w_t v_t}{\sum_{t \to c} w_t}, \quad
            \ln m_c \leftarrow \ln m_c + \ln \frac{\sum_{t \to c} w_t}{w_c}
        V_F \leftarrow V_F + A_F^\top (A_F A_F^\top + \lambda I)^{-1} (A V - A_C V_C),
            \quad F \subset C, \quad \lambda = \mathrm{tr}(A_F A_F^\top) / w
    """,
    options={
        "recent": "share of a head's tokens for the most recent ones",
        "sinks": "first tokens that always stay",
        "fade": "how far back queries count (f), a share of the text: that far from its end 1/e; None: all alike",
        "window": "last queries whose highest attention counts once more (w); 0: none",
        "kernel": "width over which that is spread along the text, odd (k)",
        "votes": "how much that counts beside the sum over all queries (c)",
        "threshold": "the cosine of two keys, less the mean key, from which one folds into the other; above 1: none",
        "norm": 'what a value adds to its token\'s score: "square" of its norm, "norm", or "none"',
        "heads": (
            'scores of the query heads, a row a layer, by which KV heads share four fifths of the budget; "probed": '
            "what a layer's attention loses without the copies that a KV head reads, times what the layer loses "
            "without attention, to the power of 3/4, in a random text of 513 tokens; "
            '"calibrated": those of `kvfold calibrate headkv`; "even": all alike'
        ),
        "refit": "last queries whose outputs the values are fitted to once tokens went; 0: none",
        "quality": '"best" reads the prompt a second time, and counts what is looked at meanwhile',
        "interval": (
            "generated tokens that gather before they are folded, too; None: a sixteenth of a budget in tokens, 64 at "
            "most and of a fraction; 0: they stay"
        ),
    },
)  # fmt: skip
@dataclass(frozen=True)
class KVFold(AtIntervals):
    """Keeps the tokens whose loss would change the answers most, and folds each of the others into its likest.

    Two scores of a token are added, each as a share of its head: the attention that it got, queries near the end of the
    text counting more; and the highest that it or its neighbours got of the last `window` queries, which hold a
    question. Both times the squared norm of the value. What goes folds into the kept token of its head with the most
    similar key, if that is similar enough (`threshold`) and the token got as much attention, or is a twin (a cosine of
    0.95); else it is dropped. The taker's value becomes the mean of both, weighted by the mean attention that each got,
    its key stays, and the log of the ratio of weights is added to its logits (the column `log_mass`), so that it gets
    the attention of all that it holds. Then the values of what is neither sink nor recent are fitted, by ridge
    regression, to what the last `refit` queries read before (as in Attention Matching, arXiv:2602.16284). Heads that
    copy get more of the budget (as retrieval heads do in HeadKV, arXiv:2410.19258, or RazorAttention,
    arXiv:2407.15891): the first cache of a model has it read a random text that repeats, and remembers an estimate of
    what each layer would lose without the copies that a head reads (on disk, under a sample of the weights). Acts at
    the end of a prompt (of every chunk, if it is read in chunks). On a further turn earlier sums fade and new ones are
    added. Query heads of a group add up their attention. `quality="best"` also asks the model to repeat the prompt (as
    KVzip does, arXiv:2505.23416), and adds the attention of that reading as a third share: about twice the prefill, and
    two columns more.
    What is generated is folded by the same rules, every `interval` tokens and a few layers at a time, but for the fit:
    the queries of an interval are too few for it (docs/LOG.md).
    This is the library's own method; docs/methods/kvfold.md has the ablations.
    """

    budget: Budget = 0.25
    recent: float = 0.25
    sinks: int = 4
    fade: float | None = 0.5
    window: int = 16
    kernel: int = 15
    votes: float = 1.0
    threshold: float = 0.4
    norm: str = "square"
    heads: Table | str = "probed"
    refit: int = 64
    quality: str = "fast"
    interval: int | None = None

    staggered = True

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("recent", self.recent, 0.0, 1.0)
        check_int("sinks", self.sinks, 0)
        if self.fade is not None:
            check_number("fade", self.fade, 1e-6)
        check_int("window", self.window, 0)
        check_int("kernel", self.kernel, 1, odd=True)
        check_number("votes", self.votes, 0.0)
        check_number("threshold", self.threshold, -1.0, 2.0)
        check_choice("norm", self.norm, ("square", "norm", "none"))
        if isinstance(self.heads, str):
            check_choice("heads", self.heads, ("probed", "calibrated", "even"))
        else:
            check_table("heads", self.heads or ())
        check_int("refit", self.refit, 0)
        check_choice("quality", self.quality, ("fast", "best"))
        check_interval("interval", self.interval, self.budget)

    def bind(self, model: Any) -> "KVFold":
        if is_all(self.budget):
            return self  # nothing is shared
        if self.heads == "probed":
            return replace(self, heads=probe("copying", model))
        return replace(self, heads=measured("headkv", model, "reason")) if self.heads == "calibrated" else self

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """Column sums that fade."""
        return frozenset({faded(self.far)})

    @property
    def far(self) -> float:
        """`fade` as a number."""
        return math.inf if self.fade is None else float(self.fade)

    def listens(self, event: str) -> bool:
        return super().listens(event) and (event != "after_prompt" or self.quality == "best")

    def after_prefill(self, view: LayerView) -> Decisions:
        if is_all(self.budget):
            return None
        attention, queries = self.attention(view)
        worth, last = self.worth(view, attention), self.last(view)
        if self.quality == "best":  # nothing goes before it was read again
            view.place.step.setdefault(LAST, {})[view.place.ordinal] = last
            return Keep(view.valid, {SCORE: attention, QUERIES: queries, WORTH: worth})
        return self.folded(view, attention, queries, worth, last)

    def after_interval(self, view: LayerView) -> Decisions:
        attention, queries = self.attention(view)
        worth = self.worth(view, attention)
        if AGAIN in view.columns:  # generated tokens were not there when the prompt was read again
            again, told = view.columns[AGAIN], view.valid & (view.columns[AGAIN] > 0)
            part = told.sum(-1, keepdim=True) / view.count.clamp(min=1)[..., None]
            worth = worth + part * share(again * self.weight(view), told & ~self.always(view))
        return self.folded(view, attention, queries, worth)

    def after_prompt(self, prompt: PromptView) -> Requests[Mapping[int, Decisions]]:
        if is_all(self.budget):
            return {}
        views = [prompt[ordinal] for ordinal in range(len(prompt))]
        again = yield from repeated(prompt, views, lambda view, _: view.column_sums(), REPEATED, QUOTED)
        found: dict[int, Decisions] = {}
        for ordinal, (view, sums) in enumerate(zip(views, again, strict=True)):
            sums += view.columns.get(AGAIN, torch.zeros_like(sums))  # of earlier prompts
            worth = view.columns[WORTH] + share(sums * self.weight(view), view.valid & ~self.always(view))
            *amends, keep = self.folded(
                view, view.columns[SCORE], view.columns[QUERIES], worth, prompt.step[LAST][ordinal]
            )
            found[ordinal] = [*amends, replace(keep, columns={**keep.columns, AGAIN: sums})]
        return found

    def folded(
        self,
        view: LayerView,
        attention: Float[Tensor, "B H T"],
        queries: Float[Tensor, "B H T"],
        worth: Float[Tensor, "B H T"],
        last: tuple[Queries, Float[Tensor, "B H N Dv"]] | None = None,
    ) -> tuple[*tuple[Amend, ...], Keep]:
        """What is written and kept when `worth` ranks the tokens.

        `last`: the last queries and what they read, to which values are fitted; None: they are not.
        """
        always = self.always(view)
        kept = keep_top(view, worth, self.counts(view), always).mask
        amend, total, mass = fold_by_attention(view, kept, attention, queries, self.threshold)
        keep = Keep(kept, {SCORE: total, QUERIES: queries, **mass})
        if not self.refit or last is None:
            return amend, keep
        return amend, refit(view, view.apply(amend).apply(keep), *last, kept & ~always), keep

    def attention(self, view: LayerView) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B H T"]]:
        """What each token got of the queries of all prompts so far, and how many those are; both fade."""
        new, queries = view.column_sums(self.far), reach(view, self.far)
        if SCORE not in view.columns:
            return new, queries
        scored = view.earlier & (view.columns[QUERIES] > 0)  # generated tokens ask nothing that counts
        last = view.positions.masked_fill(~scored, -1).amax((1, 2))
        seen = view.place.seen.to(new.device)
        past = torch.exp((last + 1 - seen) / (self.far * seen))[:, None, None] * scored
        return new + view.columns[SCORE] * past, queries + view.columns[QUERIES] * past

    def last(self, view: LayerView) -> tuple[Queries, Float[Tensor, "B H N Dv"]]:
        """The last `refit` queries and what those read."""
        asked = view.queries.last(self.refit)
        return asked, view.read_by(asked).flatten(2, 3)

    def worth(self, view: LayerView, attention: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
        """What the answers would lose with a token: by all its attention, and the highest of the last queries."""
        always, weight = self.always(view), self.weight(view)
        worth = share(attention * weight, view.valid & ~always)
        if self.window and self.votes:
            most = view.attention(self.window).amax((2, 3))
            most = smoothed(view, most * weight, always | view.last(self.window), self.kernel, "max")
            worth = worth + self.votes * share(most, view.valid)
        return worth

    def weight(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """What a value makes of the attention that it gets."""
        power = {"square": 2.0, "norm": 1.0, "none": 0.0}[self.norm]
        weight: Tensor = view.values.float().norm(dim=-1).pow(power)
        return weight

    def counts(self, view: LayerView) -> Int[Tensor, "B H"]:
        """How many tokens of each (row, head) stay."""
        room = self.room
        if isinstance(self.heads, str):
            return torch.minimum(view.budget(room), view.count)
        table = table_of(self, view, "heads", query_heads(view) if view.new else len(self.heads[0]))
        return torch.minimum(by_heads(view, room, Shares(table, view.heads, 0, POOL)), view.count)

    def always(self, view: LayerView) -> Bool[Tensor, "B H T"]:
        """The sinks and the newest tokens, as far as the budget goes."""
        counts = self.counts(view)
        sinks = (counts - 1).clamp(min=0, max=self.sinks)
        last = torch.minimum((counts * self.recent).long().clamp(min=1), counts - sinks)
        return recent(view, last) | (view.rank < sinks[..., None])


def share(scores: Float[Tensor, "B H T"], among: Bool[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
    """Scores whose sum over the tokens of `among` is 1 in each (row, head)."""
    return scores / scores.masked_fill(~among, 0.0).sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
