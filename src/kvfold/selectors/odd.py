"""Units that an index says little of: they are read whatever it says (ShadowKV's outlier chunks)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Remembered, register
from kvfold.ops import top_mask
from kvfold.options import check_int, check_number


@runtime_checkable
class Unlike(Protocol):
    """An index that knows how badly it stands for its units."""

    def unlike(self, units: int) -> Float[Tensor, "B H N"]:
        """Of each of so many units: the more, the worse; of those that are not there it has no meaning."""
        ...


@dataclass(frozen=True)
class Odd:
    """Of each KV head the `units` that its index stands for worst, and at most `share` of what a query reads.

    Which those are is found anew at each step, among all units that there are.
    """

    units: int = 48
    share: float = 1.0

    def __post_init__(self) -> None:
        check_int("units", self.units, 0)
        check_number("share", self.share, 0.0, 1.0)

    def among(
        self, remembered: Remembered, about: Bool[np.ndarray, "B H N"], room: Int[np.ndarray, " B"],
        left: Int[np.ndarray, "B H"],
    ) -> Bool[np.ndarray, "B H N"]:  # fmt: skip
        """Those that are asked `about`; rows read `room` units, of which `left[b, h]` are not taken yet."""
        assert isinstance(remembered, Unlike)  # as `Selection` has seen of its recipe
        most = np.minimum(self.units, (room * self.share).astype(np.int64))[:, None]
        scores = remembered.unlike(about.shape[-1])
        scores = scores.masked_fill(~torch.from_numpy(about).to(scores.device), -torch.inf)
        number = torch.from_numpy(np.clip(most, 0, np.maximum(left, 0))).to(scores.device)
        found: np.ndarray = top_mask(scores, number).cpu().numpy()
        return found


register("odd", Odd)
