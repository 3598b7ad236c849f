"""H2O: keep heavy hitters and a recent window, one eviction per generated token (arXiv:2306.14048)."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored, recent
from kvfold.options import check_number
from kvfold.views import LayerView

SCORE = "h2o_score"


@method(
    "h2o", title="H2O: Heavy-Hitter Oracle", paper="2306.14048", kind="evict",
    formula=r"""
        s_{h,t} \leftarrow s_{h,t} + \sum_{g}\sum_{i} A_{h,g,i,t}
        K_h = \mathrm{recent}_{\lfloor rb \rfloor} \cup \mathrm{top}_{b-\lfloor rb \rfloor}(s_h)
    """,
    options={
        "recent": "share of the budget for the most recent tokens (r)",
    },
)  # fmt: skip
@dataclass(frozen=True)
class H2O(Scored):
    """The tokens that got the most attention from all queries so far, and the most recent ones.

    A column carries each token's accumulated attention. `recent` is the share of the budget for the recent
    window (the paper: half).
    Differs from the paper: the query heads of a group add up, so that one KV head keeps one set of tokens. The
    prompt is cut once at its end (in chunked prefill after every chunk, which is stricter than the paper).
    """

    recent: float = 0.5

    asks = frozenset({"column_sums", "attention"})
    lone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("recent", self.recent, 0.0, 1.0)

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        attention = view.column_sums()
        return attention + view.columns[SCORE] if SCORE in view.columns else attention

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return recent(view, (counts * self.recent).long())

    def carried(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Mapping[str, Tensor]:
        return {SCORE: scores}

    after_decode = Scored.at_step
