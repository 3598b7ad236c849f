"""Which tokens have the highest scores."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.ops.choose import cpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.dispatch import select

__all__ = ["top_mask"]


def top_mask(scores: Float[Tensor, "B H T"], count: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
    """The `count` highest scores of each (row, head); ties go to the earlier token, -inf is never chosen.

    What is not a number counts as the lowest number.
    """
    scores = scores.nan_to_num(torch.finfo(scores.dtype).min, posinf=torch.inf, neginf=-torch.inf)
    out: Tensor = select("top_mask", scores)(scores, count)
    return out
