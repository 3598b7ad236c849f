"""Who asks in a forward pass, and which of its tokens stand for images."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """The queries of the forward pass in hand, as the model made them (after RoPE and norms)."""

    states: Float[Tensor, "B Hq Q D"]
    valid: Bool[Tensor, "B Q"]
    lse: Float[Tensor, "B Hq Q"]
    """Log-sum-exp of each query's logits over everything that it attended to."""
    positions: Int[Tensor, "B Q"]
    start: Int[Tensor, "B H"] | None = None
    """Slot of the first query's own token, the others' follow; None: the view's last Q slots."""
    read: Float[Tensor, "B Hq Q Dv"] | None = None
    """What the pass gave each of them, before the output projection; None: nobody kept it."""
    plain: bool = True
    """Whether each attended to all that the view shows before it, by the masses there; else `lse` and `read` are of
    something else: heads that streamed over a prompt, masses that tokens got when they were stored."""

    def pick(self, which: Int[Tensor, " N"]) -> "Queries":
        """Some of them, the same in every row."""
        return replace(
            self,
            states=self.states[:, :, which],
            valid=self.valid[:, which],
            lse=self.lse[:, :, which],
            positions=self.positions[:, which],
            read=None if self.read is None else self.read[:, :, which],
        )

    def of_rows(self, rows: Int[Tensor, " N"]) -> "Queries":
        """Those of some rows of the batch."""
        start, read = (None if x is None else x[rows] for x in (self.start, self.read))
        states, valid, lse, positions = (x[rows] for x in (self.states, self.valid, self.lse, self.positions))
        return replace(self, states=states, valid=valid, lse=lse, positions=positions, start=start, read=read)

    def last(self, count: int) -> "Queries":
        """The last `count` of each row, padding before them; the first of a row that has fewer are not valid."""
        slots = torch.argsort(self.valid.byte(), dim=1, stable=True)[:, max(0, self.valid.shape[1] - count) :]
        which = slots[:, None].expand(-1, self.states.shape[1], -1)
        return Queries(
            self.states.gather(2, wide(which, self.states)),
            self.valid.gather(1, slots),
            self.lse.gather(2, which),
            self.positions.gather(1, slots),
            read=None if self.read is None else self.read.gather(2, wide(which, self.read)),
            plain=self.plain,
        )


@dataclass(frozen=True)
class Images:
    """Which tokens of a forward pass stand for a part of an image or a video."""

    start: Int[Tensor, " B"]
    """Tokens that each row had read before."""
    flags: Bool[Tensor, "B Q"]
    """Of each row's n-th new token, padding not counted."""

    def of_rows(self, rows: Int[Tensor, " N"]) -> "Images":
        """Those of some rows of the batch."""
        return Images(self.start[rows], self.flags[rows])

    def at(self, positions: Int[Tensor, "B H T"]) -> Bool[Tensor, "B H T"]:
        """The flags by text position; False for what the pass did not bring."""
        start, flags = self.start.to(positions.device), self.flags.to(positions.device)
        which = positions.long() - start[:, None, None]
        wide = flags[:, None].expand(-1, positions.shape[1], -1)
        found = wide.gather(-1, which.clamp(min=0, max=flags.shape[1] - 1))
        return found & (which >= 0) & (which < flags.shape[1])


def wide(slots: Int[Tensor, "B H T"], like: Tensor) -> Tensor:
    """An index for `gather` or `scatter` along the third axis of `like`."""
    return slots.view(*slots.shape, *[1] * (like.dim() - 3)).expand(*slots.shape, *like.shape[3:])
