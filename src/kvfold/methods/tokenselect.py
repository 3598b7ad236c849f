"""TokenSelect: all heads of a layer vote for the tokens that a query reads (arXiv:2411.02886)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int, check_number
from kvfold.selectors import Alike, Always, Keys, Selection, Vote
from kvfold.views import Site

TOP = 2048
"""Tokens that the paper lets a query choose, beside its sinks and recent ones; their proportion holds at any budget."""


@method(
    "tokenselect", title="TokenSelect", paper="2411.02886", kind="select",
    formula=r"""
        c_t = \sum_h \operatorname{softmax}_t(\bar q_h \cdot k_t) \quad\text{(before RoPE)}
        I = \text{sinks} \cup \operatorname{top}_k(c) \cup \text{recent}
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "sinks": "first tokens that are always read (n_init), fewer where the budget is small",
        "recent": "last tokens that are always read (n_local), fewer where the budget is small",
        "pool": "a token is worth the most of so many around it; 1: its own",
        "reuse": "cosine of queries from which on they read what the last one chose; 2: each chooses",
        "vote": 'all heads of a "layer" vote for what they all read (the paper), or those of a KV head\'s "group"',
        "positions": 'what is read attends at positions 0, 1, 2, ... ("slots", the paper), or at its own ("text")',
    },
)  # fmt: skip
@dataclass(frozen=True)
class TokenSelect(Method):
    """Reads the first and the last tokens and those between that all query heads together attend to most.

    Keys are asked before RoPE, by a query that stands `recent` tokens behind all of them, so that distance has no say;
    a copy of them so, in 16 bits, is what it remembers (`Keys`): half of what keys and values take, or a quarter of
    float32. Each head votes by its softmax over the
    tokens between, in float32 and without 1 / sqrt(D), as in the official code. What is read attends as if it stood
    side by side: nothing is further than the budget, and a context may be longer than the model was trained on. With
    fewer tokens than 128 + 2,048 + 512 sinks and recent ones keep their shares of them. Reuse follows the paper's text;
    in the official code it is off and can't run.
    Differs from the paper: a prompt is read as a whole, exactly, where the paper reads it in selecting chunks of 512.
    """

    budget: Budget = 0.1
    sinks: int = 128
    recent: int = 512
    pool: int = 1
    reuse: float = 2.0
    vote: str = "layer"
    positions: str = "slots"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("sinks", self.sinks, 0)
        check_int("recent", self.recent, 0)
        check_int("pool", self.pool, 1)
        check_number("reuse", self.reuse, -1.0, 2.0)
        check_choice("vote", self.vote, ("layer", "group"))
        check_choice("positions", self.positions, ("slots", "text"))

    @property
    def together(self) -> bool:  # type: ignore[override]
        """Whether all heads of a layer read the same."""
        return self.vote == "layer"

    def selection(self, site: Site) -> Selection | None:
        exempt = self.sinks + self.recent
        vote = Vote("sum", layer=self.together, softmax=True, scaled=False, pool=self.pool)
        always = Always(self.sinks, self.recent, exempt / (TOP + exempt))
        reuse = None if self.reuse > 1 else Alike(self.reuse)
        return Selection(Keys(self.recent), self.budget, vote, always, reuse=reuse, slots=self.positions == "slots")
