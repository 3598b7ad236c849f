"""Two layers that hold one direction for each token: what a `Share` does to their segments."""

from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.formats import Chunk, Depth, DepthSegment
from kvfold.layer.stored import Stored
from kvfold.views.decisions import Pair, Share


def share(lower: Stored, upper: Stored, wish: Share, seen: np.ndarray, prompt: np.ndarray | int | None) -> None:
    """Move the tokens that `wish` chooses from the open segments of both layers to pages that both hold.

    `seen` (B,): tokens that each row has read. `prompt` (B,): where the prompt begins that the pass read, None where it
    read generated tokens. A row is asked about after a prompt, and every `wish.every` tokens. Where one layer has
    meanwhile dropped or changed what the other still holds, the pages are no longer shared: then everything is taken
    apart and chosen anew.
    """
    below, above = _segment(lower, 0), _segment(upper, 1)
    due = seen - below.upto >= (wish.every if prompt is None else 1)
    if not due.any():
        return
    if not below.twin(above):
        lower.unfold()
        upper.unfold()
    below.upto = np.where(due, seen, below.upto)
    if lower.open.longest and upper.open.longest:
        begins = None if prompt is None else torch.from_numpy(np.broadcast_to(prompt, seen.shape).copy())
        _move(lower, upper, below, above, wish, torch.from_numpy(due), begins)


def _segment(stored: Stored, side: int) -> DepthSegment:
    """The segment of shared directions, an empty one if there was none."""
    return cast(DepthSegment, stored.of(Depth(side)))


def _move(
    lower: Stored, upper: Stored, below: DepthSegment, above: DepthSegment, wish: Share,
    due: Bool[Tensor, " B"], begins: Int[Tensor, " B"] | None,
) -> None:  # fmt: skip
    mine, theirs = lower.open.dense(), upper.open.dense()
    there, both = matched(mine, theirs)
    device = both.device
    both &= due.to(device)[:, None, None]
    new = torch.zeros_like(both) if begins is None else both & (mine.positions >= begins.to(device)[:, None, None])
    other = theirs if there is None else theirs.take(there)
    chosen = wish.choose(Pair(mine, other, both, new, below.remembered))
    below.remembered = chosen.state
    moved = chosen.mask & both
    left = theirs.valid & ~(moved if there is None else _back(moved, there, theirs.valid))
    if not bool(moved.any()):
        return
    below.append_shared(above, mine.but(moved), other.but(moved), chosen.keys, chosen.values)
    lower.open.keep(mine.valid & ~moved, {})
    upper.open.keep(left, {})


def matched(mine: Chunk, theirs: Chunk) -> tuple[Int[Tensor, "B H T"] | None, Bool[Tensor, "B H T"]]:
    """Where the other chunk holds the token of each slot (None: in the same one), and whether it does."""
    if torch.equal(mine.valid, theirs.valid) and torch.equal(*(x.positions.where(x.valid, -1) for x in (mine, theirs))):
        return None, mine.valid.clone()
    never = torch.iinfo(torch.int32).max
    places, order = theirs.positions.masked_fill(~theirs.valid, never).sort(dim=-1, stable=True)
    wanted = mine.positions.contiguous()
    at = torch.searchsorted(places.contiguous(), wanted).clamp(max=places.shape[-1] - 1)
    return order.gather(-1, at), mine.valid & (places.gather(-1, at) == wanted)


def _back(moved: Tensor, there: Tensor, like: Tensor) -> Bool[Tensor, "B H T"]:
    """The slots of the other chunk whose tokens have moved."""
    return torch.zeros(like.shape, device=like.device, dtype=torch.int32).scatter_add_(-1, there, moved.int()) > 0
