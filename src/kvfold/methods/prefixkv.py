"""PrefixKV: every layer keeps the fewest tokens that hold the same share of its attention (arXiv:2412.03409)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.budgets import is_all
from kvfold.methods._cascade import Cascade
from kvfold.methods._elastic import MASSES, at_fixed_place, ends, into_buckets
from kvfold.methods.base import Decisions, method
from kvfold.options import check_choice, check_int
from kvfold.scores.pooled import common, line_up, split_top
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep


@method(
    "prefixkv", title="PrefixKV", paper="2412.03409", kind="evict",
    formula=r"""
        o_l(p) = \min\Big\lbrace o : \sum_{j \le o} I_{l,(j)} \ge p \Big\rbrace,
            \quad I_{l,t} = \frac{\sum_{h,g,i} A_{l,h,g,i,t}}{\sum_{u,h,g,i} A_{l,h,g,i,u}}
        \sum_l o_l(p) = L b
    """,
    options={
        "sinks": "first tokens that always stay",
        "distance": "how far from the end of the prompt's kept tokens one goes for each that is generated",
        "merge": 'what becomes of a prompt\'s other tokens: None (dropped) or "bucket", as in Elastic Cache (ours)',
        "mass": 'what tells a query how many tokens a bucket stands for: "convex" (nothing) or "counted"',
    },
)  # fmt: skip
@dataclass(frozen=True)
class PrefixKV(Cascade):
    """The tokens with the most attention of all queries and heads; one threshold p for all layers says how many.

    Layer l keeps the o_l(p) first of its tokens by importance, those that together hold p of its attention, with the p
    that uses up the budget; the first `sinks` tokens and the last one stay on top of it. In decoding a token goes for
    each that comes, `distance` from the end of what the prompt left (the middle, where that is shorter).
    Differs from the paper: p is found for each prompt, not on calibration data (its own ablation finds both alike);
    exactly, not by bisection: a token of rank o belongs to o_l(p) if the o - 1 before it hold less than p, so the
    budget goes to the lowest of those numbers in all layers. In decoding the budget stays that of the prompt, and
    does not grow with the text. All heads of a layer keep one set but for a remainder of less than a token a head.
    Neither the paper nor its code merges: `merge="bucket"` is ours (reconstructed from Elastic Cache, whose decoding
    it has). A prompt's other tokens then join the nearest one that stays, at every cut of a layer, so that a bucket is
    a mean of means unless they are counted.
    """

    sinks: int = 1
    distance: int = 25
    merge: str | None = None
    mass: str = "convex"

    asks = frozenset({"column_sums"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("sinks", self.sinks, 0)
        check_int("distance", self.distance, 1)
        check_choice("merge", self.merge, (None, "bucket"))
        check_choice("mass", self.mass, MASSES)

    @property
    def fixed(self) -> int:
        return self.sinks + 1

    def measure(self, view: LayerView) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B T"]]:
        received = view.column_sums()
        if self.column in view.columns:
            received = received + view.columns[self.column]
        importance = common(view, received)
        here = view.valid[:, 0]
        ranked = importance[:, 0].double().masked_fill(~here, 0.0).sort(-1, descending=True).values
        left = ranked.flip(-1).cumsum(-1).flip(-1)  # of a token and those after it: 1 - what those before it hold
        left = (left / left[:, :1].clamp(min=1e-30)).float()
        slots = torch.arange(left.shape[-1], device=left.device)
        return importance, left.masked_fill(slots >= here.sum(-1, keepdim=True), -torch.inf)

    def weights(self, signals: list[Tensor], free: Float[Tensor, " B"], layers: int) -> Shaped[Tensor, "B N"]:
        return split_top(line_up(signals), (free * layers + 1e-6).floor().long().to(signals[0].device))

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return ends(view, counts, self.sinks)

    def cut(self, view: LayerView, kept: Keep) -> Decisions:
        if self.merge is None:
            return kept
        return into_buckets(view, kept, self.mass, ends(view, kept.mask.sum(-1), self.sinks))

    def after_decode(self, view: LayerView) -> Drop | None:
        if is_all(self.budget):
            return None
        held = view.earlier.sum(-1)
        over = torch.where(self.short(view), 0, view.count - held)
        return at_fixed_place(view, held, over, self.distance, self.sinks)
