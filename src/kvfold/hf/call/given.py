"""The text that a cache was given, as ids: what `generate` gives next must go on where that ends."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

UNKNOWN = -1
"""In place of an id that nobody knows: padding, embeddings."""


@dataclass(frozen=True)
class Given:
    """The ids of all columns given so far, in the pieces in which they came."""

    pieces: tuple[Int[Tensor, "B _"], ...] = ()

    @property
    def width(self) -> int:
        return sum(piece.shape[1] for piece in self.pieces)

    def ids(self) -> Int[Tensor, "B W"]:
        """All of them, side by side."""
        return torch.cat([piece.cpu() for piece in self.pieces], 1)

    def more(self, ids: Int[Tensor, "B Q"] | None) -> "Given":
        """And these behind them."""
        return self if ids is None else Given((*self.pieces, ids))

    def drop(self, columns: int) -> "Given":
        """Without the last ones."""
        return Given((self.ids()[:, : max(0, self.width - columns)],)) if columns and self.pieces else self

    def select(self, rows: Int[Tensor, " N"]) -> "Given":
        """Row i becomes what row `rows[i]` was."""
        return Given((self.ids()[rows.cpu()],)) if self.pieces else self

    def differs(self, ids: Int[Tensor, "B N"]) -> int | None:
        """The first column whose id is another in `ids`, which may have less or more; None: nobody knows of one."""
        if not self.pieces:
            return None
        mine, theirs = self.ids(), ids.cpu()
        common = min(mine.shape[1], theirs.shape[1])
        if len(theirs) and len(mine) % len(theirs) == 0:  # beams, or several answers to a prompt: a row for each
            theirs = theirs.repeat_interleave(len(mine) // len(theirs), 0)
        if len(mine) != len(theirs):
            return None
        other = (mine[:, :common] != theirs[:, :common]) & (mine[:, :common] != UNKNOWN)
        return int(other.any(0).nonzero()[0]) if bool(other.any()) else None

    def begins(self, ids: Int[Tensor, "B N"], width: int) -> bool:
        """Whether `ids` are known to begin with this text of `width` columns."""
        return 0 < self.width == width and self.differs(ids) is None


def ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int[Tensor, "B Q"] | None:
    """The ids of a call of the model, what is padding or given as embeddings unknown; None: there is nothing."""
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if not isinstance(ids, Tensor):
        embeds = kwargs.get("inputs_embeds")
        return torch.full(embeds.shape[:2], UNKNOWN, dtype=torch.int64) if isinstance(embeds, Tensor) else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= ids.shape[1]:
        return ids.masked_fill(~mask[:, -ids.shape[1] :].bool().to(ids.device), UNKNOWN)
    return ids.clone()  # whoever gave them may write the next ones there
