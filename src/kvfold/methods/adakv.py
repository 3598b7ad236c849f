"""Ada-KV: the heads of a layer compete for its budget (arXiv:2407.11550)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Wrapper
from kvfold.options import check_number
from kvfold.scores import top_mask
from kvfold.scores.pooled import split_top
from kvfold.views import LayerView


@method(
    "adakv", title="Ada-KV", paper="2407.11550", kind="budget",
    formula=r"""
        n_h = \Big|\mathrm{top}_{Hc}\big(s_1 \cup \dots \cup s_H\big) \cap s_h\Big|
        b_h = (1 - \phi) n_h + \phi c
    """,
    options={
        "floor": "share of the even part that every head gets (phi)",
        "normalize": "weigh a head's scores by the part that its own best hold, for the shared ranking alone",
    },
)  # fmt: skip
@dataclass(frozen=True)
class AdaKV(Wrapper):
    """A layer's budget goes to its heads by how many of the layer's best scores each has, over any score.

    One top-k over all heads says how many tokens n_h each would keep; it gets (1 - `floor`) n_h + `floor` c, with c
    its even part. What `score` always keeps stays in every head on top. `normalize` weighs each head's scores by the
    part that its own top c hold, for the shared top-k alone. Scores must be on one scale in all heads, as attention
    is. `score="pyramidkv"` gives Ada-Pyramid.
    Differs from the paper: heads are KV heads; the rounded numbers are mended by largest remainder, so that they sum
    to the layer's budget (the official code loses some).
    """

    score: str = "snapkv(kernel=7, pool='max')"
    floor: float = 0.2
    normalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("floor", self.floor, 0.0, 1.0)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"] | None:
        # As if the budget were still shared evenly: what a window is must not depend on who won.
        return self.inner.always(
            view, counts.sum(1, keepdim=True).div(view.heads, rounding_mode="floor").expand_as(counts)
        )

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        even = self.inner.counts(view, scores)
        always = self.always(view, even)
        free = view.valid if always is None else view.valid & ~always
        stays, room = view.count - free.sum(-1), free.sum(-1)
        total = torch.minimum((even - stays).sum(1), room.sum(1)).clamp(min=0)  # B
        uniform = self._uniform(even - stays, room, total)
        scores = scores.masked_fill(~free, -torch.inf)
        wanted = split_top(scores * self._peaked(scores, uniform) if self.normalize else scores, total)
        return stays + round_to(wanted.double() * (1 - self.floor) + uniform * self.floor, total)

    @staticmethod
    def _uniform(even: Int[Tensor, "B H"], room: Int[Tensor, "B H"], total: Int[Tensor, " B"]) -> Float[Tensor, "B H"]:
        """Even shares of the total in float64; what a short head can't hold goes to the others by their room."""
        uniform = torch.minimum(even.clamp(min=0), room).double()
        left, room = total.double() - uniform.sum(1), room - uniform
        return uniform + left[:, None] * room / room.sum(1, keepdim=True).clamp(min=1)

    @staticmethod
    def _peaked(scores: Float[Tensor, "B H T"], uniform: Float[Tensor, "B H"]) -> Float[Tensor, "B H 1"]:
        """The part of each head's scores that its own best hold."""
        best = scores.masked_fill(~top_mask(scores, uniform.floor().long()), 0.0).sum(-1)
        whole = scores.masked_fill(scores.isinf(), 0.0).sum(-1)
        return (best / whole.clamp(min=1e-12)).clamp(min=1e-12)[..., None]


def round_to(shares: Float[Tensor, "B H"], total: Int[Tensor, " B"]) -> Int[Tensor, "B H"]:
    """Shares rounded half to even as the official code does, then mended where their sum is not `total`.

    Those that rounding took most from get one more, or those that it gave most to get one less.
    """
    shares = (shares * 1e6).round() / 1e6
    whole = shares.round()
    missing = total - whole.sum(1)
    taken = shares - whole
    rank = taken.argsort(stable=True, dim=1, descending=True).argsort(1)
    more, less = rank < missing[:, None], rank >= shares.shape[1] + missing[:, None]
    rounded: Tensor = (whole + more.double() - less.double()).long()
    return rounded
