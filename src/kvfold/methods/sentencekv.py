"""SentenceKV: keep what the prompt's end looks at, and read the sentences nearest to the one being written."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.methods.snapkv import SnapKV
from kvfold.options import check_int, check_ints, check_number
from kvfold.selectors import SENTENCE, Always, Selection, Sentences
from kvfold.views import LayerView, NewWords, Site
from kvfold.views.decisions import Decisions

MOST = 2**31 - 1
"""No budget is larger."""


@method(
    "sentencekv", title="SentenceKV", paper="2504.00970", kind="select",
    formula=r"""
        \mu_j = \frac{1}{|S_j|} \sum_{t \in S_j} k_t, \quad \bar q = \frac{1}{|Q|} \sum_{i \in Q} q_i
        \text{read tokens of the } S_j \text{ with the largest } \bar q \cdot \mu_j
    """,
    options={
        "budget": "what a generated token reads (tau): a fraction of the text so far, or a number of tokens",
        "factor": "what a prompt keeps, times the budget (rho); 0: everything",
        "window": "queries at the prompt's end whose attention says what it keeps",
        "sinks": "first of the kept tokens that are always read, fewer where the budget is small",
        "recent": "last tokens that are always read, fewer where the budget is small",
        "marks": "ids of tokens that end a sentence; (): those whose text does, by the model's tokenizer",
    },
)  # fmt: skip
@dataclass(frozen=True)
class SentenceKV(Method):
    """Keeps `factor` times the budget of a prompt by SnapKV's rule, and reads whole sentences of that at each step.

    A sentence is known by the mean of its keys (after RoPE), and asked by the mean query of the sentence that is being
    written; where that has one token, or has just ended, everything that is kept is read, as in the official code (the
    paper's figure does not say so). The last sentence that is read is cut where the budget ends. A sentence ends with a
    token whose text does; so one-by-one is all at once, which a library that splits text is not.
    Differs from the paper: the query heads of a group vote together for what is kept, so that a KV head keeps one set;
    the sentence that is being written is one of those that may be read; slot lists have no upper bound.
    """

    budget: Budget = 0.1
    factor: float = 3.0
    window: int = 32
    sinks: int = 32
    recent: int = 32
    marks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("factor", self.factor, 0.0)
        check_int("window", self.window, 1)
        check_int("sinks", self.sinks, 0)
        check_int("recent", self.recent, 0)
        check_ints("marks", self.marks)

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """What a cache must know for it: where sentences end, unless `marks` says so."""
        return frozenset() if self.marks else frozenset({"sentence_ends"})

    def label(self, words: NewWords) -> Mapping[str, Tensor]:
        ids, known = words.ids(self), None if self.marks else words.ends()
        if known is None:
            ends = torch.isin(ids, torch.tensor(self.marks, dtype=ids.dtype))
        else:
            ends = known[ids.clamp(max=len(known) - 1)] & (ids < len(known))
        ends = ends & words.valid
        before = ends.long().cumsum(-1) - ends.long()
        first = (words.newest(SENTENCE) + 1) // 2  # behind a token that ends one the next begins
        return {SENTENCE: (2 * (first[:, None] + before) + ends.long()).to(torch.int32)}

    def after_prefill(self, view: LayerView) -> Decisions:
        if not self.factor:
            return None
        kept = self.budget * self.factor
        budget = min(1.0, float(kept)) if isinstance(self.budget, float) else min(max(1, int(kept)), MOST)
        return SnapKV(budget=budget, window=self.window, kernel=7, pool="max").after_prefill(view)

    def selection(self, site: Site) -> Selection | None:
        return Selection(Sentences(), self.budget, always=Always(self.sinks, self.recent, 0.25))
