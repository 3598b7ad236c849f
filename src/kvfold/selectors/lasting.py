"""What is worth reading whoever asks: chosen beside what the query asks for, so that it stays read (NOSA)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Remembered, register
from kvfold.ops import top_lists
from kvfold.options import check_number


@runtime_checkable
class Lasts(Protocol):
    """An index that knows what its units are worth to nobody in particular."""

    def lasting(self, units: int) -> Float[Tensor, "B H N"]:
        """Of each of so many units; of those that are not whole it has no meaning."""
        ...


@dataclass(frozen=True)
class Lasting:
    """Of the room for units that are not always read the query has a share; the others are those of most lasting worth.

    The query's are at most `query` of all that is read, the newest unit counted as one of them, and at least one
    (NOSA, arXiv:2510.13602: of 64 blocks 16, with the newest; beside these and 17 more that are always read, 31).
    """

    query: float = 0.25

    def __post_init__(self) -> None:
        check_number("query", self.query, 0.0, 1.0)

    def asked(self, room: Int[np.ndarray, " B"], free: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
        """Of rows that read `room` units, `free` of them not taken yet, how many the query has."""
        share = np.maximum(np.floor(room * self.query + 1e-9).astype(np.int64) - 1, 1)
        most: np.ndarray = np.minimum(share[:, None], np.maximum(free, 0))
        return most

    def among(
        self, remembered: Remembered, about: Bool[np.ndarray, "B H S N"], left: Int[np.ndarray, "B H"]
    ) -> Bool[np.ndarray, "B H S N"]:
        """Those of the units `about` that each list reads, `left[b, h]` of them; ties go to the earlier one."""
        assert isinstance(remembered, Lasts)  # as `Selection` has seen of its recipe
        scores = remembered.lasting(about.shape[-1])[:, :, None].expand(about.shape)
        return top_lists(scores.masked_fill(~torch.from_numpy(about).to(scores.device), -torch.inf), left)


register("lasting", Lasting)
