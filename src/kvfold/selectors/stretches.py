"""A coarse and a fine choice of units, which some layers in a row read as stretches of text (MPCache)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Chosen, Handed, Picked, Remembered, register
from kvfold.ops import top_mask
from kvfold.options import check_int, check_number
from kvfold.selectors.corners import Corners, CornersOf
from kvfold.selectors.handed import OfAPass
from kvfold.selectors.places import Places, PlacesOf


@dataclass(frozen=True)
class Stretches(OfAPass):
    """Model layer `layer` lets the best `coarse` of its large units go on, and reads the best `ratio` of all units.

    A unit is worth what `corners` tell the mean query of a group. At least one is chosen each time, and always the
    first and the last; two large ones, between which there is nothing to choose, are read whole. What was chosen is
    handed on, as stretches of text, to layers that read it (`OfStretches`).
    """

    layer: int
    corners: Corners
    coarse: float = 0.5
    ratio: float = 0.2

    def __post_init__(self) -> None:
        check_int("layer", self.layer, 0)
        check_number("coarse", self.coarse, 0.0, 1.0)
        check_number("ratio", self.ratio, 0.0, 1.0)

    @property
    def index(self) -> Corners:
        """What it goes by."""
        return self.corners

    def chooses(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H"]:
        """See `Chooser.chooses`."""
        some: np.ndarray = counts > 2 * self.corners.parts * self.unit
        return some

    def choose(
        self, remembered: Remembered, q: Float[Tensor, "B H G D"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"], last: Picked | None = None,
    ) -> tuple[Chosen | None, Picked | None]:  # fmt: skip
        """See `Chooser.choose`."""
        assert isinstance(remembered, CornersOf)
        some = self.chooses(counts, seen)
        if not some.any():
            return None, None
        units, asked, parts = -(-counts // self.unit), remembered.asks(q, seen), self.corners.parts
        worth = remembered.scores(asked, units)[:, :, 0]
        going = _best(remembered.large_scores(asked, units)[:, :, 0], -(-units // parts), self.coarse)
        rivals = worth.masked_fill(~going.repeat_interleave(parts, -1)[..., : worth.shape[-1]], -torch.inf)
        read = _best(rivals, units, self.ratio).cpu().numpy() | ~some[..., None]
        read &= np.arange(read.shape[-1]) < units[..., None]
        return Chosen.of(read[:, :, None]), None

    def hand(self, remembered: Remembered, chosen: Chosen | None, handed: Handed) -> None:
        """See `Handing.hand`."""
        assert isinstance(remembered, CornersOf)
        handed[self] = None if chosen is None else (remembered.places.held[:, :, : chosen.total, 0], chosen)


@dataclass(frozen=True)
class OfStretches(OfAPass):
    """Reads the tokens of the stretches of text that layer `of` has chosen in this pass.

    Its own first and last unit, too; everything, where that layer has read everything, or was not there.
    """

    of: Stretches

    def __post_init__(self) -> None:
        if not isinstance(self.of, Stretches):
            raise ValueError(f"of={self.of!r} must be what a layer chooses")

    @property
    def index(self) -> Places:
        """Where its tokens stand."""
        return Places(1)

    def take(self, counts: Int[np.ndarray, "B H"], handed: Handed, remembered: Remembered) -> Chosen | None:
        """See `Taking.take`."""
        assert isinstance(remembered, PlacesOf)
        if (given := handed.get(self.of)) is None:
            return None
        (begins, chosen), unit = given, self.of.unit
        begins, own = begins.cpu().numpy(), remembered.held[..., 0].cpu().numpy()  # layers may lie on several devices
        lists = list[Int[np.ndarray, " K"]]()
        for row, head in np.ndindex(counts.shape):
            mine, theirs, count = own[row, head], chosen.numbers[row, head, 0], int(counts[row, head])
            theirs = theirs[: chosen.counts[row, head, 0]]
            ends = np.append(begins[row, head, 1:], PlacesOf.fill)
            first, behind = np.searchsorted(mine[:count], [begins[row, head, theirs], ends[theirs]])
            last = (count - 1) // unit * unit if count else 0
            first, behind = np.append(first, [0, last]), np.append(behind, [min(unit, count), count])
            lists.append(np.unique(_ranges(first, behind)))
        most = max(map(len, lists), default=0)
        numbers = np.full((len(lists), most), -1, dtype=np.int32)
        for line, some in zip(numbers, lists, strict=True):
            line[: len(some)] = some
        sizes = np.array([len(some) for some in lists], dtype=np.int32)
        b, h = counts.shape
        return Chosen(numbers.reshape(b, h, 1, most), sizes.reshape(b, h, 1), int(counts.max(initial=0)))


def _ranges(first: Int[np.ndarray, " R"], behind: Int[np.ndarray, " R"]) -> Int[np.ndarray, " K"]:
    """All numbers from each `first` on to the one before `behind`."""
    sizes = behind - first
    begin = np.repeat(first - np.concatenate([[0], sizes.cumsum()[:-1]]), sizes)
    found: np.ndarray = begin + np.arange(len(begin))
    return found


def _best(worth: Float[Tensor, "B H N"], number: Int[np.ndarray, "B H"], share: float) -> Bool[Tensor, "B H N"]:
    """So much of each row's `number` units, at least one, and its first and last."""
    wanted = torch.from_numpy(np.maximum((number * share).astype(np.int64), 1)).to(worth.device)
    best: Tensor = top_mask(worth, wanted)
    at, last = torch.arange(worth.shape[-1], device=worth.device), torch.from_numpy(number - 1).to(worth.device)
    return best | (at == 0) | (at == last[..., None])


register("stretches", Stretches)
register("of-stretches", OfStretches)
