"""Uneven levels of numbers: what they are for keys and for values, and which numbers stand out (arXiv:2401.18079)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats.gaussian import lloyd_max
from kvfold.ops.choose import top_mask

BITS = (2, 3, 4)
"""Bits that a code may have."""


@dataclass(frozen=True)
class Levels:
    """Of keys: where each channel's range begins and ends, and 2^bits levels, -1 its beginning and 1 its end.

    Of values: 2^bits levels in the range of a token. A code stands for its level times the gain plus the shift of a
    fit.
    """

    low: Float[Tensor, "*N D"]
    high: Float[Tensor, "*N D"]
    keys: Float[Tensor, "*N K"]
    key_fit: Float[Tensor, "*N 2"]
    values: Float[Tensor, "*N K"]
    value_fit: Float[Tensor, "*N 2"]

    def flat(self) -> Float[Tensor, "*N W"]:
        """As one tensor, as segments hold it."""
        return torch.cat([self.low, self.high, self.keys, self.key_fit, self.values, self.value_fit], -1)

    @classmethod
    def of(cls, flat: Float[Tensor, "*N W"], size: int, bits: int) -> "Levels":
        """What `flat` made, for keys of `size` numbers."""
        count = 1 << bits
        return cls(*torch.split(flat, [size, size, count, 2, count, 2], -1))

    @classmethod
    def normal(cls, size: int, bits: int, device: torch.device) -> "Levels":
        """Where nobody has measured: keys as if normal, of mean 0 and variance 1; values normal from end to end."""
        levels = torch.tensor(lloyd_max(bits), dtype=torch.float32, device=device)
        ones = torch.ones(size, dtype=torch.float32, device=device)
        fit = torch.tensor([1.0, 0.0], dtype=torch.float32, device=device)
        return cls(-ones, ones, levels, fit, levels / levels[-1], fit)

    @property
    def centre(self) -> Float[Tensor, "*N D"]:
        """The middle of each key channel's range."""
        return self.low / 2 + self.high / 2

    @property
    def reach(self) -> Float[Tensor, "*N D"]:
        """Half of each key channel's range."""
        return self.high / 2 - self.low / 2

    def said(self, what: str) -> Float[Tensor, "*N K"]:
        """What the codes of "keys" or "values" stand for, in their range."""
        levels, fit = (self.keys, self.key_fit) if what == "keys" else (self.values, self.value_fit)
        return levels * fit[..., :1] + fit[..., 1:]


def width(size: int, bits: int) -> int:
    """Numbers of `Levels.flat`."""
    return 2 * size + 2 * ((1 << bits) + 2)


def in_range(x: Float[Tensor, "*N D"], centre: Tensor, reach: Tensor) -> Float[Tensor, "*N D"]:
    """Numbers as shares of their range, -1 to 1 inside it; what a range of one number holds is not stretched."""
    return (x - centre) / reach.masked_fill(reach == 0, 1.0)


def nearest(shares: Float[Tensor, "B H T D"], levels: Float[Tensor, "B H K"]) -> Int[Tensor, "B H T D"]:
    """The code of the nearest level of each (row, head), of two as near the lower one."""
    cuts = (levels[..., 1:] / 2 + levels[..., :-1] / 2).flatten(0, 1).contiguous()
    found = torch.searchsorted(cuts, shares.flatten(0, 1).flatten(1).contiguous(), out_int32=True)
    return found.view(shares.shape)


def furthest(distance: Float[Tensor, "*N D"], count: int) -> Bool[Tensor, "*N D"]:
    """The `count` numbers of each vector that are furthest off; ties go to the earlier channel.

    What is not finite is further off than all that is.
    """
    size = distance.abs().nan_to_num(torch.inf, posinf=torch.inf).reshape(1, -1, distance.shape[-1])
    counts = torch.full(size.shape[:2], count, dtype=torch.int64, device=distance.device)
    return top_mask(size, counts).view(distance.shape)


def outstanding(values: Float[Tensor, "*N D"], count: int) -> Bool[Tensor, "*N D"]:
    """The `count` numbers of each value that are furthest from its median."""
    return furthest(values - values.nanmedian(-1, keepdim=True).values, count)


def ends(values: Float[Tensor, "*N D"], apart: Bool[Tensor, "*N D"]) -> tuple[Tensor, Tensor]:
    """Centre and reach (*N, 1) of what is not `apart`; 0 and 0 where all is."""
    low = values.masked_fill(apart, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(apart, -torch.inf).amax(-1, keepdim=True)
    alone = apart.all(-1, keepdim=True)
    return (low / 2 + high / 2).masked_fill(alone, 0.0), (high / 2 - low / 2).masked_fill(alone, 0.0)
