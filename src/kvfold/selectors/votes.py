"""Whose query says what a unit is worth: each query head's for itself, or all of a group, or of the layer, together."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import register
from kvfold.options import check_choice, check_int

HEADS = ("each", "sum", "max")
"""Whether each query head reads units of its own, or all of them what has the largest sum, or maximum, over them."""
UNION = "union"
"""All of them read what any of them would: the best of each, then the second of each, and so on (A2ATS)."""


@dataclass(frozen=True)
class Vote:
    """How the scores (B, H, G, N) of G query heads for each KV head become what units are worth to a list of them.

    `layer`: the query heads of all KV heads vote together, and all of these read the same. `softmax`: what is added, or
    compared, is each query head's softmax over the units that are not read anyhow (TokenSelect's soft vote,
    arXiv:2411.02886); with `scaled` its logits are divided by sqrt(D), as in attention. `pool`: the worth of a unit is
    the most among so many around it, (pool - 1) // 2 of them before it.
    """

    heads: str = "each"
    layer: bool = False
    softmax: bool = False
    scaled: bool = True
    pool: int = 1

    def __post_init__(self) -> None:
        check_choice("heads", self.heads, (*HEADS, UNION))
        check_int("pool", self.pool, 1)
        for name in ("layer", "softmax", "scaled"):
            check_choice(name, getattr(self, name), (True, False))
        if self.layer and self.heads == "each":
            raise ValueError("layer=True lets all heads read the same, and heads='each' each of them its own")

    @property
    def plain(self) -> bool:
        """Whether it is a group's, by the scores as they are."""
        return self.heads in HEADS and not self.layer and not self.softmax and self.pool == 1

    @property
    def soft(self) -> bool:
        """Whether it is the sum, or the maximum, of softmaxes and nothing else."""
        return self.softmax and self.heads in ("sum", "max") and self.pool == 1

    def scale(self, size: int) -> float:
        """What logits of keys of so many numbers are multiplied by before a softmax."""
        return size**-0.5 if self.scaled else 1.0

    def lists(self, group: int) -> int:
        """Lists of each KV head, whose group has so many query heads."""
        return group if self.heads == "each" else 1

    def worth(
        self, scores: Float[Tensor, "B H G N"], asked: Bool[Tensor, "B H N"], size: int
    ) -> Float[Tensor, "B H S N"]:
        """What each unit that is `asked` about is worth, float32; -inf for the others. `size`: numbers of a key."""
        others = ~asked[:, :, None]
        worth = scores.masked_fill(others, -torch.inf)
        if self.softmax:
            worth = (worth * self.scale(size)).softmax(-1).masked_fill(others, -torch.inf)
        if self.heads == UNION:  # a unit is worth the best place that it has with any of them
            order = torch.argsort(worth, dim=-1, descending=True, stable=True)
            place = torch.arange(worth.shape[-1], device=worth.device, dtype=worth.dtype).expand(worth.shape)
            worth = -torch.empty_like(worth).scatter_(-1, order, place)
        if self.heads != "each":
            over = (1, 2) if self.layer else (2,)
            worth = worth.sum(over, keepdim=True) if self.heads == "sum" else worth.amax(over, keepdim=True)
        if self.pool > 1:
            before = (self.pool - 1) // 2
            padded = F.pad(worth, (before, self.pool - 1 - before), value=-torch.inf)
            worth = F.max_pool1d(padded.flatten(0, 2), self.pool, 1).view(worth.shape)
        worth = worth.expand(-1, scores.shape[1], -1, -1) if self.layer else worth
        return worth.masked_fill(others, -torch.inf)


register("vote", Vote)
