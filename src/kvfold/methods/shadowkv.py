"""ShadowKV: keys before RoPE as a product of low rank, chunks read by their landmarks (arXiv:2410.21465)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.formats import Shadowed
from kvfold.methods.base import Method, method
from kvfold.options import LARGEST, check_int
from kvfold.selectors import Always, Means, Odd, Selection, Vote
from kvfold.views import Site

CHOSEN, LOCAL, OUTLIERS = 256, 4, 48
"""Chunks that a query reads in the paper, at 2,048 tokens chosen: what is chosen, the last ones, and outliers."""
LAST = 0.25
"""Most of what is read that the last chunks take (ours)."""


@method(
    "shadowkv", title="ShadowKV", paper="2410.21465", kind="low-rank",
    formula=r"""
        X \approx U_r W, \quad X \ \text{the keys of all KV heads before RoPE}
        a_{h,g,j} = \operatorname{softmax}_j(q_{h,g} \cdot \bar k_{h,j} / \sqrt D), \quad
            \bar k_{h,j} = \tfrac1c \textstyle\sum_{t \in j} k_{h,t} \ \text{after RoPE}
        I_h = \text{local} \cup \text{outliers}_h \cup \operatorname{top}(\max_g a_{h,g})
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "rank": "numbers of a token for the keys of all KV heads (r); as many as those have, or more: keys as they are",
        "chunk": "tokens that are read, or not, together (c)",
        "local": "last chunks that are always read, and stay as they are",
        "outliers": "chunks of each KV head that are least like their landmark: always read, and as they are",
    },
)  # fmt: skip
@dataclass(frozen=True)
class ShadowKV(Method):
    """Reads the last chunks, the outliers, and the chunks whose mean key has the largest softmax of a group's queries.

    A prompt is attended exactly; then the keys of all KV heads before RoPE, side by side, become a product of rank
    `rank`, where that takes less room with its basis and outliers. A key is rebuilt, and turned to its position, when
    it is read. Values are held as they are. Outliers are the chunks with the least cosine between a key and their mean.
    Where all is read, the error is that of the rank alone: none from H D on.
    Differs from the paper: what is always read counts in the budget. Outliers take their share of it (48 of 308 chunks)
    at most, the last chunks a quarter. Generated chunks have landmarks, may be outliers, and are read, or not, as those
    of the prompt are: the paper reads all that is generated, which grows without bound. Their keys stay as they are,
    as there. A further turn that is long enough, or a chunk of a prompt, is a piece with a basis of its own.
    """

    budget: Budget = 0.1
    rank: int = 160
    chunk: int = 8
    local: int = LOCAL
    outliers: int = OUTLIERS

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name, least in (("rank", 1), ("chunk", 1), ("outliers", 0)):
            check_int(name, getattr(self, name), least)
        check_int("local", self.local, 0, high=LARGEST // self.chunk)

    @property
    def format(self) -> Shadowed:  # type: ignore[override]
        """What all tokens of a layer are held in."""
        return Shadowed(self.rank, self.chunk, self.local, self.outliers)

    def selection(self, site: Site) -> Selection:
        always = Always(recent=self.local * self.chunk, share=LAST)
        odd = Odd(self.outliers, OUTLIERS / (CHOSEN + LOCAL + OUTLIERS))
        return Selection(Means(self.chunk), self.budget, Vote("max", softmax=True), always, odd=odd)
