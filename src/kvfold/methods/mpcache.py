"""MPCache: one cut after the prompt, then a coarse and a fine choice of clusters at every token (arXiv:2501.06807)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import is_all
from kvfold.formats import Reader
from kvfold.methods.base import method
from kvfold.methods.scored import Scored, recent
from kvfold.options import check_int, check_number
from kvfold.scores.peaks import peaks
from kvfold.selectors import Corners, OfStretches, Stretches
from kvfold.views import LayerView, Site

LONG, FEWER = 24_000, 0.5
"""Prompts of more tokens are judged by fewer of their queries: half the share."""


@method(
    "mpcache", title="MPCache", paper="2501.06807", kind="evict",
    formula=r"""
        s_t = \max_{i \in W} \frac{1}{HG}\sum_{h,g} A_{h,g,i,t}
        u_c = q^\top\big(\alpha \max_{t \in c} k_t + (1 - \alpha) \min_{t \in c} k_t\big)
    """,
    options={
        "threshold": "least score of a token that stays, within the budget; None: the budget alone says",
        "asking": "share of the prompt's queries, from its end, that judge (W); half of it over 24,000 tokens",
        "alpha": "weight of a cluster's upper corner against its lower one",
        "coarse": "tokens of a large cluster",
        "fine": "tokens of a small cluster; divides `coarse`",
        "coarse_ratio": "share of the large clusters that go on",
        "ratio": "share of the small clusters that a generated token reads",
        "share": "layers in a row that read what the first of them chose",
    },
)  # fmt: skip
@dataclass(frozen=True)
class MPCache(Scored):
    """Drops what none of the prompt's last queries looks at, then lets each generated token read a few clusters.

    A token counts as much as its highest attention, a mean over the layer's heads, from the last `asking` of the
    prompt's queries; `threshold` keeps only what reaches it, within the budget. When decoding, a cluster of
    consecutive tokens is worth q (alpha max k + (1 - alpha) min k): the best `coarse_ratio` of large clusters go
    on, and of their halves as many as `ratio` of all. `share` layers in a row read the stretches of text that their
    first chose (groups of 2, and text in place of indices, since each layer drops tokens of its own:
    reconstructed). A budget of 1.0 without threshold is the full cache: everything is kept and read.
    Differs from the paper: attention is causal and scaled (the official code's is neither, and its thresholds fit
    only that); a budget instead of a threshold for each data set; the newest token always stays; the mean query of
    a group chooses, so that one KV head reads one set; the last cluster, which holds the newest, is always read, and
    two large clusters, between which there is nothing to choose, are read whole. Bounds are held in 16 bits, and kept
    up with the tokens, where the official code works them out anew at every step.
    """

    threshold: float | None = None
    asking: float = 0.2
    alpha: float = 0.6
    coarse: int = 32
    fine: int = 16
    coarse_ratio: float = 0.5
    ratio: float = 0.2
    share: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0.0, 1.0)
        for name in ("asking", "alpha", "coarse_ratio", "ratio"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("coarse", "fine", "share"):
            check_int(name, getattr(self, name), 1)
        if self.coarse % self.fine:
            raise ValueError(f"coarse={self.coarse!r} must be a multiple of fine={self.fine!r}")

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        valid = view.queries.valid
        own = valid.sum(1, keepdim=True)
        share = self.asking * torch.where(own > LONG, FEWER, 1.0).double()
        window = (own.double() * share).long().clamp(min=1)
        return peaks(view, valid & (own - valid.cumsum(1) < window), heads="mean")

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        allowed = super().counts(view, scores)
        if self.threshold is None:
            return allowed
        enough = ((scores >= self.threshold) & view.valid).sum(-1).clamp(min=1)  # the newest token stays
        return torch.minimum(allowed, enough.to(allowed.device))

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return recent(view, counts.clamp(max=1))

    def selection(self, site: Site) -> Reader | None:
        if is_all(self.budget) and self.threshold is None:
            return None
        first = site.ordinal - site.ordinal % self.share
        index = Corners(self.fine, self.coarse // self.fine, self.alpha)
        chooses = Stretches(site.paged[first], index, self.coarse_ratio, self.ratio)
        return chooses if first == site.ordinal else OfStretches(chooses)
