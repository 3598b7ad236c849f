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


def common(
    view: LayerView, scores: Float[Tensor, "B H T *W"], votes: Float[Tensor, " H"] | None = None
) -> Float[Tensor, "B H T *W"]:
    """The mean over the heads that hold a token, by its text position: heads that keep one set have one score.

    `votes`: of how many numbers each head's score is the sum (default: 1); what only heads without votes hold gets 0.
    """
    (b, h, t), wide = view.valid.shape, scores.shape[3:]
    votes = torch.ones(h, device=scores.device, dtype=torch.float32) if votes is None else votes.to(scores.device)
    scores, holders = scores.reshape(b, h, t, -1), view.valid.float() * votes[:, None]
    scores = scores.masked_fill(~view.valid[..., None], 0.0)
    if bool((view.positions == view.positions[:, :1]).all()) and bool((view.valid == view.valid[:, :1]).all()):
        mean = scores.sum(1, keepdim=True) / holders.sum(1).clamp(min=1)[:, None, :, None]
        return mean.expand(-1, h, -1, -1).reshape(b, h, t, *wide)
    size = max(1, int(view.place.seen.max()))
    places = view.positions.long().clamp(max=size - 1).flatten(1)  # padding may stand behind
    total = torch.zeros(b, size, scores.shape[-1], device=scores.device, dtype=torch.float32)
    total = total.scatter_add(1, places[..., None].expand(-1, -1, total.shape[-1]), scores.flatten(1, 2))
    count = torch.zeros(b, size, device=scores.device, dtype=torch.float32).scatter_add(1, places, holders.flatten(1))
    mean = total / count.clamp(min=1)[..., None]
    return mean.gather(1, places[..., None].expand(-1, -1, total.shape[-1])).view(b, h, t, *wide)
