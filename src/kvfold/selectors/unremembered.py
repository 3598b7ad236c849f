"""An index of nothing: what chooses by attention itself has it, to say which tokens are a unit."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chunk, Spec, register
from kvfold.options import check_int
from kvfold.pages import PAGE_SIZE
from kvfold.selectors.held import HeldUnits, nothing


@dataclass(frozen=True)
class Unremembered:
    """Units of `unit` tokens, of which nothing is remembered: who chooses goes by something else."""

    unit: int = PAGE_SIZE
    enough = 0

    def __post_init__(self) -> None:
        check_int("unit", self.unit, 1)

    def open(self, spec: Spec) -> "UnrememberedOf":
        return UnrememberedOf(self, spec, nothing(spec, 0))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        if tensors:
            raise ValueError(f"index={sorted(tensors)} of units of which nothing is remembered")

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "UnrememberedOf":
        return self.open(spec)


class UnrememberedOf(HeldUnits):
    """`held` (B, H, 0, 0)."""

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        return 0

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """Raises NotImplementedError: nobody asks it."""
        raise NotImplementedError(f"{self.recipe} remembers nothing that a query could be compared with")

    def state(self) -> dict[str, Tensor]:
        return {}


register("unremembered", Unremembered)
