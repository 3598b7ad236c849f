"""The most attention that any query gives to a token: all of them without a row of attention for each."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.scores.pooled import common
from kvfold.views import LayerView

BLOCK = 64
"""Queries whose attention is held at a time."""


def peaks(view: LayerView, asking: Bool[Tensor, "B Q"] | None = None, heads: str = "max") -> Float[Tensor, "B H T"]:
    """The highest attention that each token gets from one of the pass's queries (those that `asking` marks).

    Over the query heads of a group the highest counts ("max"), or the mean of all heads of the layer that hold the
    token ("mean": every head has the same score for it).
    """
    queries = view.queries
    asking = queries.valid if asking is None else asking & queries.valid
    chosen = asking.any(0).nonzero()[:, 0]
    best = torch.zeros(view.valid.shape, device=view.valid.device, dtype=torch.float32)
    for some in torch.split(chosen, BLOCK):
        part = replace(queries.pick(some), valid=asking[:, some])
        weights = replace(view, queries=part, memo={}).attention(len(some))  # B H G W T
        most = weights.amax((2, 3)) if heads == "max" else common(view, weights.mean(2).mT).amax(3)
        best = torch.maximum(best, most)
    return best
