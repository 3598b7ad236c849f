"""PQCache: reads what product codes of the keys say is most attended, by a codebook of their own (arXiv:2407.12820)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.selectors import Products, Proportions, Selection, Vote
from kvfold.views import Site


@method(
    "pqcache", title="PQCache", paper="2407.12820", kind="select",
    formula=r"""
        \hat u_{h,t} = \sum_m q_{h,m} \cdot c_{m, \mathrm{code}(m, t)}, \quad
            p_h = \operatorname{softmax}_t(\hat u_{h,t} / \sqrt D)
        I = \text{sinks} \cup \text{recent} \cup \operatorname{top}_k \Big(\sum_{h \in \text{group}} p_{h,t}\Big)
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "parts": "sub-vectors of a key (m), each with a codebook",
        "bits": "of a sub-vector's code: 2^bits centroids",
        "sinks": "first tokens that are always read and belong to no codebook; at most a quarter of the budget is",
        "recent": "share of the rest of the budget that goes to the last tokens",
        "iterations": "of k-means, at most",
        "seed": "of its random starts",
    },
)  # fmt: skip
@dataclass(frozen=True)
class PQCache(Method):
    """Reads sinks, recent tokens, and of those between what the query heads of a KV head would attend to most.

    What they would attend to is worked out from codes: each sub-vector of a key (after RoPE) is the nearest centroid of
    a codebook that k-means makes of this text's own keys, once, when a generated token first has to choose; later keys
    get codes of the same one. Until there are more keys behind the sinks than centroids everything is read. Which keys
    k-means starts from depends on the seed, layer and head alone.
    Differs from the paper: a budget counts the sinks and the token itself, and a fraction is one of the text so far,
    where the paper adds sinks on top and freezes the numbers when the prompt is read: of 1,032 tokens it goes on
    reading 133, which is budget=133. There is no block cache, which changes no output.
    """

    budget: Budget = 0.1
    parts: int = 2
    bits: int = 6
    sinks: int = 32
    recent: float = 0.5
    iterations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
        self.selection(None)  # raises for options that can't be

    def selection(self, site: Site | None) -> Selection:
        index = Products(self.parts, self.bits, self.sinks, self.iterations, self.seed)
        return Selection(index, self.budget, Vote("sum", softmax=True), Proportions(self.sinks, self.recent))
