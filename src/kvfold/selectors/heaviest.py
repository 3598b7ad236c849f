"""Which values a query reads that has met every key: those of the largest weights."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import register
from kvfold.ops import top_mask
from kvfold.options import check_choice
from kvfold.selectors.selection import Selection


@dataclass(frozen=True)
class Heaviest(Selection):
    """`budget` values of each KV head: those of the tokens that get most, by the `vote` of its query heads (KCache).

    Nothing is read in any case. The softmax is over all keys; with `renormalize` weights of what is read sum to 1.
    """

    renormalize: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("renormalize", self.renormalize, (True, False))

    def weigh(
        self, weights: Float[Tensor, "B H G T"], valid: Bool[Tensor, "B H T"], seen: Int[np.ndarray, " B"]
    ) -> Bool[Tensor, "B H S T"]:
        """See `Weighing.weigh`. A weight too small for float32 is as good as another such: the earlier is read."""
        worth = self.vote.worth(weights, valid, 1)
        b, h, lists, t = worth.shape
        room = torch.from_numpy(self.room(seen)).to(worth.device)[:, None].expand(b, h * lists)
        best: Tensor = top_mask(worth.reshape(b, h * lists, t), room).view(b, h, lists, t)
        return best & valid[:, :, None]


register("heaviest", Heaviest)
