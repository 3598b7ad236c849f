"""From scores to kept tokens: smoothing along the sequence, and top-k with stable ties."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.ops import top_mask
from kvfold.views import LayerView
from kvfold.views.decisions import Keep


def smooth(scores: Float[Tensor, "B H T"], kernel: int, pool: str = "avg") -> Float[Tensor, "B H T"]:
    """Each score becomes the mean (or maximum) of the `kernel` scores around it, zeros beyond both ends."""
    if kernel == 1:
        return scores
    if pool == "max":
        return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def keep_top(
    view: LayerView,
    scores: Float[Tensor, "B H T"],
    count: Int[Tensor, "B H"],
    always: Bool[Tensor, "B H T"] | None = None,
) -> Keep:
    """Keep the `count` tokens with the highest scores; those of `always` come first of all and count too."""
    scores = scores.masked_fill(~view.valid, -torch.inf)
    if always is not None:
        scores = scores.masked_fill(always & view.valid, torch.inf)
    return Keep(top_mask(scores, count.to(scores.device)))
