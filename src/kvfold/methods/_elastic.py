"""What ElasticCache and PrefixKV share: both ends stay, buckets by place in the text, deletion at a fixed place."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.merges import absorb, counted, log_mass, nearest_place, over_set
from kvfold.scores import drop_from
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Drop, Keep

MASSES = ("convex", "counted")
"""What tells a query how many tokens a bucket stands for: nothing, or the log of their number at its logit."""


def ends(view: LayerView, counts: Int[Tensor, "B H"], sinks: int) -> Bool[Tensor, "B H T"]:
    """The last token and the first `sinks`, as far as `counts` goes."""
    first = (counts - 1).clamp(min=0, max=sinks)[..., None]
    return view.valid & ((view.rank < first) | (view.rank == view.count[..., None] - 1))


def into_buckets(view: LayerView, keep: Keep, mass: str, apart: Bool[Tensor, "B H T"] | None = None) -> list[Decision]:
    """What goes joins the nearest token that stays, by place in the text; a bucket becomes its mean.

    Those that are `apart` take nothing in; with no other in its head, what goes is dropped.
    `mass`: "counted" notes how many tokens a bucket stands for, and each weighs as many as it stands for.
    """
    home = nearest_place(view.positions, view.valid & ~keep.mask, keep.mask if apart is None else keep.mask & ~apart)
    many = log_mass(view).exp()
    columns = counted(view, home) if mass == "counted" else {}
    return [absorb(view, home, many / over_set(many, home)), Keep(keep.mask, {**keep.columns, **columns})]


def at_fixed_place(
    view: LayerView, held: Int[Tensor, "B H"], over: Int[Tensor, "B H"], distance: int, sinks: int
) -> Drop:
    """Drop `over` tokens from one place on: `distance` from the end of `held` (its middle, if that is shorter).

    What lies behind it moves up, so the end of the prompt goes first and then the oldest that were generated. The
    first `sinks` tokens and the newest stay.
    """
    slot = torch.where(held > distance, held - distance, held // 2).clamp(min=sinks)
    return drop_from(view, slot.minimum((view.count - over - 1).clamp(min=0)), over)
