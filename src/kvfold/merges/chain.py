"""Sets of neighbouring tokens by single linkage along the sequence: cut a chain of links into runs."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.scores import top_mask


def neighbour_cosine(keys: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T"]:
    """Cosine of each key with the next one, float32; the last slot has -inf."""
    unit = F.normalize(keys.float(), dim=-1)
    return F.pad((unit[:, :, :-1] * unit[:, :, 1:]).sum(-1), (0, 1), value=-torch.inf)


def chain_links(
    cosine: Float[Tensor, "B H T"],
    free: Bool[Tensor, "B H T"],
    count: Int[Tensor, "B H"],
    threshold: float | None = None,
) -> Bool[Tensor, "B H T"]:
    """Which tokens join the next one: both free, and cosine among the `count` largest or over `threshold`.

    Taking the n largest admissible links is the backward scan of KVMerger with its threshold set to that
    quantile, since on a chain every link saves one slot. Ties go to the earlier pair.
    """
    both = free & F.pad(free[..., 1:], (0, 1), value=False)
    link = top_mask(cosine.masked_fill(~both, -torch.inf), count)
    return link if threshold is None else link | (both & (cosine > threshold))


def sets_of(link: Bool[Tensor, "B H T"]) -> Int[Tensor, "B H T"]:
    """The set of each slot: runs of linked slots share a number, counted from 0 along the sequence."""
    opens = ~F.pad(link[..., :-1], (1, 0), value=False)
    return opens.cumsum(-1) - 1
