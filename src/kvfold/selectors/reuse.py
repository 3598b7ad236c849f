"""When what a query has chosen is what the next ones read, too."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Picked, register
from kvfold.options import check_int, check_number


@runtime_checkable
class Reuse(Protocol):
    """A rule for when a choice is stale; a row that has none, or whose units have changed, chooses in any case."""

    def __hash__(self) -> int: ...

    @property
    def compares(self) -> bool:
        """Whether it looks at the query that chose."""
        ...

    def stale(self, choice: Picked, q: Float[Tensor, "B E"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """Which rows, whose texts are `seen` tokens with the one that asks, choose anew."""
        ...


@dataclass(frozen=True)
class Every:
    """A choice is made where the text before the token that asks is a multiple of `steps` (LServe, arXiv:2502.14866).

    It is of the text and no count of calls: rows of a batch that differ in length choose each at its own time, and a
    choice made before such a place is stale behind it, whatever was read in between.
    """

    steps: int = 4
    compares = False

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)

    def stale(self, choice: Picked, q: Float[Tensor, "B E"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """See `Reuse.stale`."""
        before: np.ndarray = (seen - 1) // self.steps != (choice.made - 1) // self.steps
        return before


@dataclass(frozen=True)
class Alike:
    """A choice serves as long as queries point where the one did that made it (TokenSelect, arXiv:2411.02886).

    A row chooses anew where the cosine between all heads' queries, as one vector, and those that chose is less than
    `cosine`: with 1 or more always but for equal ones, with -1 never.
    """

    cosine: float = 0.9
    compares = True

    def __post_init__(self) -> None:
        check_number("cosine", self.cosine, -1.0, 2.0)

    def stale(self, choice: Picked, q: Float[Tensor, "B E"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, " B"]:
        """See `Reuse.stale`."""
        met: np.ndarray = (torch.cosine_similarity(choice.query, q, -1) >= self.cosine).cpu().numpy()
        return ~met


register("every", Every)
register("alike", Alike)
