"""Which units of its tokens a query reads: the best by an index, and some whatever that says."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.formats import Chosen, Index, Remembered, register
from kvfold.ops import choose_units
from kvfold.options import check_choice, check_int

HEADS = ("each", "sum", "max")
"""Whether each query head of a group has units of its own, or all read what has the largest sum, or maximum."""


@dataclass(frozen=True)
class Selection:
    """`budget` tokens of each KV head (a fraction: of the row's text so far) in whole units, never fewer than `least`.

    The unit that is still growing, or was the last to grow, is always read, then the first `sinks` and the last
    `recent` tokens as far as the budget goes; the others are those that `index` says are worth most to the query. What
    it reads whatever the index says counts in the budget.
    """

    index: Index
    budget: Budget
    heads: str = "each"
    sinks: int = 0
    recent: int = 0
    least: int = 1

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_choice("heads", self.heads, HEADS)
        check_int("sinks", self.sinks, 0)
        check_int("recent", self.recent, 0)
        check_int("least", self.least, 1)

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.index.unit

    def room(self, seen: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
        """Units that a query reads at most in rows whose texts are so long."""
        tokens = (
            np.floor(seen * self.budget + 1e-9) if isinstance(self.budget, float) else np.full(len(seen), self.budget)
        )
        room: np.ndarray = np.maximum(tokens.astype(np.int64) // self.unit, self.least)
        return room

    def choose(
        self, remembered: Remembered, q: Float[Tensor, "B H G D"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"],
    ) -> Chosen | None:  # fmt: skip
        """Which units each query head (S = G) or KV head (S = 1) reads; None: all of them, in every row."""
        units, room = -(-counts // self.unit), self.room(seen)
        if is_all(self.budget) or (units <= room[:, None]).all():
            return None
        scores = remembered.scores(q, units)
        sinks, recent = -(-self.sinks // self.unit), -(-self.recent // self.unit)
        best = choose_units(scores, units, room, heads=self.heads, sinks=sinks, recent=recent)
        return Chosen(*best, scores.shape[-1])


register("selection", Selection)
