"""Which tokens have the highest scores."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.ops.choose import cpu, naive  # noqa: F401  (each registers itself)
from kvfold.ops.dispatch import select

__all__ = ["top_lists", "top_mask"]


def top_mask(scores: Float[Tensor, "B H T"], count: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
    """The `count` highest scores of each (row, head); ties go to the earlier token, -inf is never chosen.

    What is not a number counts as the lowest number.
    """
    scores = scores.nan_to_num(torch.finfo(scores.dtype).min, posinf=torch.inf, neginf=-torch.inf)
    out: Tensor = select("top_mask", scores)(scores, count)
    return out


def top_lists(scores: Float[Tensor, "B H S N"], count: Int[np.ndarray, "B H"]) -> Bool[np.ndarray, "B H S N"]:
    """`top_mask` of S lists for each (row, head), all of which have as many; below 0 it is none."""
    b, h, lists, n = scores.shape
    wide = torch.from_numpy(np.maximum(count, 0).repeat(lists, 1)).to(scores.device)
    found: np.ndarray = top_mask(scores.reshape(b, h * lists, n), wide).view(b, h, lists, n).cpu().numpy()
    return found
