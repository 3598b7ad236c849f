"""KCache: every key is asked, and the values of those that get most are read (arXiv:2404.18057)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int
from kvfold.selectors import HEADS, Heaviest, Selection, Unremembered, Vote
from kvfold.views import Site


@method(
    "kcache", title="KCache", paper="2404.18057", kind="select",
    formula=r"""
        p = \operatorname{softmax}(q K^\top / \sqrt D), \quad I = \operatorname{top}_N(p)
        o = \sum_{t \in I} p_t v_t
    """,
    options={
        "budget": "values that a generated token reads: a number of tokens (N), or a fraction of the text so far",
        "dense": "first layers that read everything",
        "group": 'the query heads of a KV head read what has the largest "sum" or "max" of weights, or "each" its own',
        "renormalize": "whether the weights of what is read sum to 1",
    },
)  # fmt: skip
@dataclass(frozen=True)
class KCache(Method):
    """Asks every key, exactly, and reads the values of those N tokens alone that got most; what others got is lost.

    The softmax is over all keys, so that with a larger N the same tokens come first, and what is left out changes an
    answer by no more than its weight times the largest value. Nothing is remembered beside the tokens. Weights are not
    renormalised (reconstructed: no code is public, and the paper filters the result of the softmax), nor is the number
    of dense layers certain (reconstructed). Texts of N tokens or fewer are read as ever.
    Differs from the paper: the query heads of a KV head read the same values, by the sum of what they give them (ours;
    its models have a KV head for each query head), with `group="each"` values of their own. Values lie where the cache
    lies, and not in a host's memory.
    """

    budget: Budget = 128
    dense: int = 1
    group: str = "sum"
    renormalize: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("dense", self.dense, 0)
        check_choice("group", self.group, HEADS)
        check_choice("renormalize", self.renormalize, (True, False))

    def selection(self, site: Site) -> Selection | None:
        if site.layer < self.dense:
            return None
        return Heaviest(Unremembered(1), self.budget, Vote(self.group), renormalize=self.renormalize)
