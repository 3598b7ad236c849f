"""SnapKV: keep the keys that the end of the prompt looks at (arXiv:2404.14469)."""

from dataclasses import dataclass

from kvfold.budgets import Budget, check_budget
from kvfold.decisions import Keep
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_int
from kvfold.scores import keep_top, smooth
from kvfold.views import LayerView


@method("snapkv", title="SnapKV", paper="2404.14469", kind="evict")
@dataclass(frozen=True)
class SnapKV(Method):
    """Attention mass of the last `window` queries, smoothed along the sequence; the window itself always stays.

    Acts at the end of a prompt (of every chunk, if it is read in chunks; a chunk shorter than the window shrinks
    the window); generated tokens are appended. A budget smaller than the window keeps its end.
    Differs from the paper: the query heads of a group vote together (before pooling), so that one KV head keeps
    one set of tokens and grouped-query models really shrink.
    """

    budget: Budget = 0.25
    window: int = 32
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_choice("pool", self.pool, ("avg", "max"))

    def after_prefill(self, view: LayerView) -> Keep:
        budget = view.budget(self.budget)
        window = view.last(self.window)
        votes = view.attention(self.window).sum(3).mean(2)  # B H T
        votes = view.pack(votes.masked_fill(window | ~view.valid, 0.0))  # empty slots are nobody's neighbours
        votes = view.unpack(smooth(votes, self.kernel, self.pool))
        latest = view.rank >= (view.count - budget.clamp(max=self.window))[..., None]
        return keep_top(view, votes.masked_fill(window, 0.0), budget, always=window & latest)
