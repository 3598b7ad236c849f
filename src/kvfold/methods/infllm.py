"""InfLLM: a window, and blocks far behind it that are found by a few of their tokens (arXiv:2402.04617)."""

from dataclasses import dataclass

import torch

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int
from kvfold.scores.nearby import looks_nearby
from kvfold.selectors import Always, Representatives, Selection, Vote, looked
from kvfold.views import LayerView, Site
from kvfold.views.decisions import Keep

SHARE = (128 + 4096) / (2048 + 4096)
"""Sinks and window, of what the paper's query reads beside the block that still grows: 16 blocks of 128, and those."""


@method(
    "infllm", title="InfLLM", paper="2402.04617", kind="select",
    formula=r"""
        r_{b,h} = \frac{1}{R} \sum_{t \in \operatorname{top}_R(b,h)} k_t, \quad
            s_b = \sum_h \bar q_h \cdot r_{b,h} \quad\text{(keys before RoPE, the query at } n - 1)
        o = \operatorname{softmax}\big(q_i^\top k_j \ \text{at distance}\ \min(i - j,\, n - 1)\big)\, v
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "block": "tokens that are looked up together",
        "sinks": "first tokens that are always read (n_init), fewer where the budget is small",
        "local": "tokens of the window (n): read, fewer where the budget is small; what is further stands at its end",
        "representatives": "tokens of a block that stand for it, for each query head (R)",
        "vote": 'all heads of a "layer" choose what they all read (the paper), or those of a KV head\'s "group"',
    },
)  # fmt: skip
@dataclass(frozen=True)
class InfLLM(Method):
    """Reads the first tokens, the window, and the blocks whose representatives the query of all heads meets best.

    What is further behind a query than the window stands all at one distance, that of the window's end: a text may be
    longer than the model was trained on, and a text of at most `local` tokens, all of it read, is attended as it is.
    A block's representatives are for each query head the tokens that got most attention from the prompt's queries in
    the window behind them, and their mean key before RoPE stands for the block; one set of blocks serves all heads of
    a layer. What each head gave a token is held beside it, 4 bytes a query head. Sinks and window take at most the
    share of the budget that they have in the paper (128 + 4,096 tokens beside 16 blocks).
    Differs from the paper: a prompt, and a further turn, is read whole and exactly, at true positions, where the paper
    streams it through the window. Representatives are of the pass in which their tokens came; a block whose tokens no
    prompt's queries looked at (generated ones) stands by the mean of all its keys. A block can be looked up from the
    token after it on.
    """

    budget: Budget = 0.1
    block: int = 128
    sinks: int = 128
    local: int = 4096
    representatives: int = 4
    vote: str = "layer"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("block", self.block, 1)
        check_int("sinks", self.sinks, 0)
        check_int("local", self.local, 1)
        check_int("representatives", self.representatives, 1)
        check_choice("vote", self.vote, ("layer", "group"))

    @property
    def together(self) -> bool:  # type: ignore[override]
        """Whether all heads of a layer read the same."""
        return self.vote == "layer"

    def selection(self, site: Site) -> Selection:
        return Selection(
            Representatives(self.block, self.representatives, self.local - 1), self.budget,
            Vote("sum", layer=self.together), Always(self.sinks, self.local, SHARE), far=self.local,
        )  # fmt: skip

    def after_prefill(self, view: LayerView) -> Keep:
        new = torch.arange(view.valid.shape[-1], device=view.valid.device) >= view.valid.shape[-1] - view.new
        columns = {}
        for head, given in enumerate(looks_nearby(view, self.local).unbind(2)):
            # What tokens of an earlier pass got of its queries is what their block was made by.
            columns[looked(head)] = torch.where(new, given, view.columns.get(looked(head), torch.zeros_like(given)))
        return Keep(view.valid, columns)
