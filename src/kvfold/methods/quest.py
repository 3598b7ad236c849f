"""Quest: keep everything, read the pages whose keys could matter most to the query (arXiv:2406.10774)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int
from kvfold.selectors import HEADS, Bounds, Selection, Vote
from kvfold.views import Site


@method(
    "quest", title="Quest", paper="2406.10774", kind="select",
    formula=r"""
        m_{p,d} = \min_{t \in p} k_{t,d}, \quad M_{p,d} = \max_{t \in p} k_{t,d}
        u_p = \sum_d \max(q_d m_{p,d},\, q_d M_{p,d})
    """,
    options={
        "budget": "what a generated token reads: a fraction of the text so far, or a number of tokens",
        "page": "tokens of a page (P)",
        "dense": "first layers that read everything",
        "group": '"each" query head has pages of its own (the paper), or a group those of the largest "sum" or "max"',
    },
)  # fmt: skip
@dataclass(frozen=True)
class Quest(Method):
    """Reads the newest page, and of the others those whose bound is highest; no query finds more in a page than that.

    Pages are the tokens in their order, `page` at a time. Of each the least and the largest number of every channel of
    its keys (after RoPE) are remembered, and kept current as tokens come; the bound is worked out in float32. The first
    `dense` layers read everything, as does a prompt. The newest page counts in the budget and is never asked, as in the
    official CUDA code (its Python reference lets it compete, and reads at least three pages). Nothing is dropped:
    memory grows by 1 / `page` of what there is.
    Differs from the paper: with `group="sum"` or "max" the query heads of a group share pages (ours).
    """

    budget: Budget = 0.1
    page: int = 16
    dense: int = 2
    group: str = "each"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("page", self.page, 1)
        check_int("dense", self.dense, 0)
        check_choice("group", self.group, HEADS)

    def selection(self, site: Site) -> Selection | None:
        if site.layer < self.dense:
            return None
        return Selection(Bounds(self.page), self.budget, Vote(self.group))
