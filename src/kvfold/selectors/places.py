"""Where in the text units begin: by it, what one layer chose is found in another, which may hold other tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE
from kvfold.selectors.held import HELD, HeldUnits, check_held, ends, nothing


@dataclass(frozen=True)
class Places:
    """Of each unit of `unit` tokens the text position of its first one; no query is compared with that."""

    unit: int = PAGE_SIZE
    enough = 0

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "PlacesOf":
        return PlacesOf(self, spec, nothing(spec, 1, torch.int32))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        check_held(spec, tensors, counts, self.unit, 1, torch.int32)

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "PlacesOf":
        return PlacesOf(self, spec, tensors[HELD].to(spec.device).clone())


class PlacesOf(HeldUnits):
    """`held` (B, H, N, 1): text positions, behind any text where no token has come."""

    fill = 2**31 - 1

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        valid = tokens.valid
        if not bool(valid.any()):
            return
        self.reach(-(-ends(valid, start) // self.unit))
        begin = torch.from_numpy(np.ascontiguousarray(start)).to(valid.device)
        number = begin[..., None] + valid.cumsum(-1) - 1
        row, head, slot = (valid & (number % self.unit == 0)).nonzero(as_tuple=True)
        self.held[row, head, number[row, head, slot] // self.unit, 0] = tokens.positions[row, head, slot].int()

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """Raises NotImplementedError: nobody asks it."""
        raise NotImplementedError(f"{self.recipe} knows nothing that a query could be compared with")


register("places", Places)
