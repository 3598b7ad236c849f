"""Which units of its tokens each list reads, as their numbers: nothing is as long as all there is."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, Int32

from kvfold.ops.units.naive import listed


@dataclass(frozen=True, eq=False)
class Chosen:
    """`numbers` ascending and then -1, `counts` of them, out of `total`.

    Units are counted through a row's tokens in their order; the query heads of a group share its S lists evenly.
    """

    numbers: Int32[np.ndarray, "B H S K"]
    counts: Int32[np.ndarray, "B H S"]
    total: int

    @classmethod
    def of(cls, mask: Bool[np.ndarray, "B H S N"]) -> "Chosen":
        """The units that a mask marks."""
        numbers, counts = listed(mask)
        return cls(numbers, counts, mask.shape[-1])

    def of_heads(self, heads: Int[np.ndarray, " N"]) -> "Chosen":
        """KV head i reads what head `heads[i]` does here."""
        return Chosen(self.numbers[:, heads], self.counts[:, heads], self.total)

    @property
    def mask(self) -> Bool[np.ndarray, "B H S N"]:
        """Each unit, and whether a list has it."""
        found = np.zeros((*self.counts.shape, self.total + 1), dtype=bool)  # -1 falls behind the last
        np.put_along_axis(found, self.numbers.astype(np.int64), True, -1)
        return found[..., : self.total]
