"""How much a key repeats others of its head: the mean cosine to them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.views import LayerView

BLOCK = 64
"""Keys that are compared with all others at once: memory goes with the tokens, not with their square."""


def redundancy(view: LayerView, threshold: float) -> Float[Tensor, "B H T"]:
    """The mean cosine of each key to its head's keys, float32, 0 where empty; a key is not compared with itself.

    Of several keys that repeat each other the newest is spared: each key's cosine to the last of those that are liker
    to it than `threshold` counts as 0, so that what says a thing again is not redundant for its having been said.
    """
    keys = F.normalize(view.keys.float(), dim=-1).masked_fill(~view.valid[..., None], 0.0)
    slots = torch.arange(keys.shape[2], device=keys.device)
    total = torch.zeros(view.valid.shape, device=keys.device, dtype=torch.float32)
    for block in torch.split(slots, BLOCK):
        cosines = keys[:, :, block] @ keys.mT  # B H N T
        cosines[..., block - block[0], block] = 0.0
        liker = (cosines > threshold) & view.valid[:, :, None]
        last = torch.where(liker, slots, -1).amax(-1, keepdim=True)  # tokens lie in the order of the text
        spared = cosines.gather(-1, last.clamp(min=0)).masked_fill(last >= 0, 0.0)
        cosines.scatter_(-1, last.clamp(min=0), spared)
        total += cosines.masked_fill_(~view.valid[:, :, block, None], 0.0).sum(2)
    return (total / view.count.clamp(min=1)[..., None]).masked_fill(~view.valid, 0.0)
