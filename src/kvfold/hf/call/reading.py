"""Prompts that the model reads otherwise than they were given: fewer tokens, more, in another order.

The caller goes on as if nothing had happened: with attention masks and lengths of the text that it gave. A `Reading`
says what the model got instead, and a pre-hook rewrites the arguments of every later call. Positions are those of the
tokens that are read, side by side.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """What the model has read so far of the text that it was given."""

    valid: Bool[Tensor, "B W"]
    """Which of the columns read are not padding."""
    places: Int[Tensor, "B W"]
    """Where in the given text each column's token stands."""
    given: Int[Tensor, " B"]
    """Tokens of text given, padding not counted."""
    surplus: int = 0
    """Columns given more than read."""
    fixed: int = 0
    """Columns read in an order of the method's: they can't be taken back one by one."""

    @classmethod
    def plain(cls, valid: Bool[Tensor, "B W"]) -> "Reading":
        """A text that was read as it stands."""
        return cls(valid, (valid.cumsum(1) - 1).int(), valid.sum(1))

    def read(
        self, valid: Bool[Tensor, "B Q"], order: Int[Tensor, "B N"] | None
    ) -> tuple["Reading", Int[Tensor, "B N"]]:
        """After a pass over tokens of which `valid` are not padding; also the columns read, -1 for padding."""
        columns = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        taken = columns.masked_fill(~valid, -1) if order is None else order
        text = self.given[:, None] + valid.cumsum(1) - 1
        after = replace(
            self,
            valid=torch.cat([self.valid, taken >= 0], 1),
            places=torch.cat([self.places, text.gather(1, taken.clamp(min=0)).int()], 1),
            given=self.given + valid.sum(1),
            surplus=self.surplus + valid.shape[1] - taken.shape[1],
        )
        return after if order is None else replace(after, fixed=after.valid.shape[1]), taken

    def drop(self, columns: int) -> "Reading":
        """Without the last columns. Raises ValueError where the method chose their order."""
        left = self.valid.shape[1] - columns
        if left < self.fixed:
            raise ValueError(f"crop takes back {columns} tokens, but {self.fixed} columns are a prompt read as a whole")
        gone = self.valid[:, left:].sum(1)
        return replace(self, valid=self.valid[:, :left], places=self.places[:, :left], given=self.given - gone)

    def select(self, rows: Int[Tensor, " N"]) -> "Reading":
        """Row i becomes what row `rows[i]` was."""
        rows = rows.to(self.valid.device)
        return replace(self, valid=self.valid[rows], places=self.places[rows], given=self.given[rows])

    def in_text(self, row: int, positions: list[int]) -> list[int]:
        """Where tokens at these positions of what was read stand in the given text, ascending."""
        places = self.places[row][self.valid[row]].tolist()
        return sorted(places[position] for position in positions)
