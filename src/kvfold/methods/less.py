"""LESS: what an eviction drops lives on in a small recurrent state, read as linear attention (arXiv:2402.09398)."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kvfold import artefacts
from kvfold.formats import Summed
from kvfold.formats.feature_maps import bring
from kvfold.methods._calibrated import bound_data
from kvfold.methods._merging import Merging
from kvfold.methods.base import Method, method
from kvfold.options import check_name
from kvfold.views import ATTENTION, LayerView
from kvfold.views.decisions import Decisions, Keep, Store


@method(
    "less", title="LESS", paper="2402.09398", kind="low-rank",
    formula=r"""
        o = \frac{\phi(q) S + \sum_{i \in K} \exp(q^\top k_i / \sqrt D) v_i}
          {\phi(q) z + \sum_{i \in K} \exp(q^\top k_i / \sqrt D)}
        S \leftarrow S + \psi(k_e)^\top v_e, \quad z \leftarrow z + \psi(k_e)
        \phi(q) = |a(a(q W_1) W_2)|, \quad \psi(k) = |u + (u U_3) \odot s_2|, \quad
          u = |s_1| \odot a(a(k U_1) U_2), \quad a = \mathrm{gelu}
    """,
)  # fmt: skip
@dataclass(frozen=True)
class LESS(Merging):
    """What `score` drops folds into R (D + 1) numbers of its KV head, R of a calibration; each query reads them too.

    Tokens are held, and counted by the budget, as with `score` alone; the state comes on top (8 (D + 1) numbers in
    float32 at the calibration's own rank: as much as 8 tokens of a model in bfloat16). Which ones a step drops is
    ranked by attention among tokens alone; what a further prompt gives them is ranked with the state in its sums.
    `kvfold calibrate less` trains phi of each query head and psi of each KV head; `calibration` names their file, and
    a cache sets it. The state is for good: of a text from which tokens were folded in, a crop takes back what came
    later, or all. Not with compact positions: what was folded in can't move.
    Differs from the paper: budgets are shares of the prompt; a prompt of a further turn, or a chunk, reads the state
    as generated tokens do. No weight has the official code's floor of 1e-6: an empty state answers nothing. With
    grouped queries one psi and one state serve a KV head, as theirs do for multi-query models.
    """

    calibration: str | None = None

    stores = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("calibration", self.calibration, "a file of feature maps")

    def choosing(self, made: Method) -> Method:
        if made.compact:
            raise ValueError(f"score={self.score!r} has compact positions, and what less folds in can't move")
        return super().choosing(made)

    def bind(self, model: Any) -> "LESS":
        bound = super().bind(model)
        where, found = artefacts.locate(self.info.slug, model, self.calibration)
        bring(found.data)
        assert isinstance(bound, LESS)
        return replace(bound, calibration=where)

    @cached_property
    def maps(self) -> str:
        """The name by which formats know the feature maps. Raises ValueError where there are none."""
        return bring(bound_data(self.info.slug, self.calibration, "trained feature maps"))

    def merged(self, view: LayerView, keep: Keep) -> Decisions:
        gone = view.valid & ~keep.mask
        if not bool(gone.any()):
            return keep
        if view.place.compact:
            raise ValueError(f"method={self} beside compact positions: what it folds in can't move")
        return [Store(Summed(self.maps, view.place.ordinal), gone), keep]

    def after_decode(self, view: LayerView) -> Decisions:
        return self.merged(view, self.selected(among_tokens(view), "after_decode"))


def among_tokens(view: LayerView) -> LayerView:
    """The view of a step whose query has shared its attention out among tokens alone."""
    left = view.memo.get(ATTENTION)
    if left is None:
        return view
    total = left.sum(-1, keepdim=True)
    return replace(view, memo={**view.memo, ATTENTION: left / total.masked_fill(total == 0, 1.0)})
