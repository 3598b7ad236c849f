"""Which units of its tokens a query reads: the best by an index, and some whatever that says."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.formats import Index, Remembered, register
from kvfold.ops import top_mask
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
    ) -> Bool[np.ndarray, "B H S N"] | None:  # fmt: skip
        """Which units each query head (S = G) or KV head (S = 1) reads; None: all of them, in every row."""
        units, room = -(-counts // self.unit), self.room(seen)
        if is_all(self.budget) or (units <= room[:, None]).all():
            return None
        scores = remembered.scores(q, units)
        if self.heads != "each":
            scores = scores.sum(2, keepdim=True) if self.heads == "sum" else scores.amax(2, keepdim=True)
        scores = self._forced(scores, units, room)
        (b, h, lists, n), wide = scores.shape, np.broadcast_to(room[:, None], units.shape).repeat(scores.shape[2], 1)
        best = top_mask(scores.reshape(b, h * lists, n), torch.from_numpy(wide.copy()).to(scores.device))
        chosen: np.ndarray = best.view(b, h, lists, n).cpu().numpy()
        return chosen

    def _forced(
        self, scores: Float[Tensor, "B H S N"], units: Int[np.ndarray, "B H"], room: Int[np.ndarray, " B"]
    ) -> Float[Tensor, "B H S N"]:
        """What is always read is worth more than all else, and the more surely, the more."""
        high = torch.finfo(scores.dtype).max
        scores = scores.clamp(max=high / 8)  # NaN stays, which is never chosen before a number
        place = torch.arange(scores.shape[-1], device=scores.device)
        behind = (torch.from_numpy(units).to(scores.device)[..., None] - 1 - place)[:, :, None]  # 0: the last one
        there = behind >= 0
        if self.recent:
            scores = scores.masked_fill(there & (behind <= -(-self.recent // self.unit)), high / 4)
        if self.sinks:
            scores = scores.masked_fill(there & (place < -(-self.sinks // self.unit)), high / 2)
        return scores.masked_fill(behind == 0, high)


register("selection", Selection)
