"""Scores that compete with those of other heads or layers, and scores that heads have in common."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.ops import top_mask
from kvfold.views import LayerView


def split_top(scores: Float[Tensor, "B N T"], count: Int[Tensor, " B"]) -> Int[Tensor, "B N"]:
    """How many of the `count` highest of all scores of a row fall to each of its N sharers; -inf never counts."""
    return top_mask(scores.flatten(1)[:, None], count[:, None])[:, 0].view(scores.shape).sum(-1)


def line_up(scores: list[Float[Tensor, "B _"]]) -> Float[Tensor, "B N T"]:
    """Scores of sharers with different numbers of slots side by side, -inf behind."""
    longest = max(x.shape[-1] for x in scores)
    pads = (x.new_full((x.shape[0], longest - x.shape[-1]), -torch.inf) for x in scores)
    return torch.stack([torch.cat([x, pad], -1) for x, pad in zip(scores, pads, strict=True)], 1)


def common(view: LayerView, scores: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
    """The mean over the heads that hold a token, by its text position: heads that keep one set have one score."""
    size = (*scores.shape[:1], max(1, int(view.place.seen.max())))
    places = view.positions.long().clamp(max=size[1] - 1)  # padding may stand behind
    total, holders = (
        torch.zeros(size, device=scores.device).scatter_add(1, places.flatten(1), x.flatten(1))
        for x in (scores.masked_fill(~view.valid, 0.0), view.valid.float())
    )
    mean = total / holders.clamp(min=1)
    return mean[:, None].expand(-1, view.heads, -1).gather(2, places)
