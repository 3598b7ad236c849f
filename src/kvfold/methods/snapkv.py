"""SnapKV: keep the keys that the end of the prompt looks at (arXiv:2404.14469)."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored, exempt
from kvfold.options import check_choice, check_int
from kvfold.scores.smoothed import smoothed
from kvfold.views import LayerView


@method(
    "snapkv", title="SnapKV", paper="2404.14469", kind="evict",
    formula=r"""
        s_{h,t} = \mathrm{pool}_k\Big(\frac{1}{G}\sum_{g}\sum_{i \in W} A_{h,g,i,t}\Big)
        K_h = W \cup \mathrm{top}_{b-w}(s_h)
    """,
    options={
        "window": "queries at the prompt's end whose attention counts (w); their tokens always stay",
        "kernel": "width of the pooling along the sequence, odd (k)",
        "pool": '"avg" or "max"',
    },
)  # fmt: skip
@dataclass(frozen=True)
class SnapKV(Scored):
    """Attention mass of the last `window` queries, smoothed along the sequence; the window itself always stays.

    Acts at the end of a prompt (of every chunk, if it is read in chunks; a chunk shorter than the window shrinks
    the window); generated tokens are appended. A budget without room for it and 4 more tokens keeps both ends of the
    text, the first 4 and the newest (ours: the end alone leaves no sink, and the model babbles).
    Differs from the paper: the query heads of a group vote together (before pooling), so that one KV head keeps one set
    of tokens and grouped-query models really shrink.
    """

    window: int = 32
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_choice("pool", self.pool, ("avg", "max"))

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        window = view.last(self.window)
        votes = view.attention(self.window).sum(3).mean(2)  # B H T
        return smoothed(view, votes, window, self.kernel, self.pool)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.window)
