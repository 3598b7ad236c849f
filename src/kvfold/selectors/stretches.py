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
        return _chosen(read, units), None

    def hand(self, remembered: Remembered, chosen: Chosen | None, handed: Handed) -> None:
        """See `Handing.hand`."""
        assert isinstance(remembered, CornersOf)
        handed[self] = None if chosen is None else (remembered.places.held[:, :, : chosen.total, 0], chosen)


@dataclass(frozen=True)
class OfStretches(OfAPass):
    """Reads the units that begin in what the layer `of` has chosen in this pass, and its own first and last one.

    Everything, where that layer has read everything, or was not there.
    """

    of: Stretches

    def __post_init__(self) -> None:
        if not isinstance(self.of, Stretches):
            raise ValueError(f"of={self.of!r} must be what a layer chooses")

    @property
    def index(self) -> Places:
        """Where its units begin."""
        return Places(self.of.unit)

    def take(self, counts: Int[np.ndarray, "B H"], handed: Handed, remembered: Remembered) -> Chosen | None:
        """See `Taking.take`."""
        assert isinstance(remembered, PlacesOf)
        if (given := handed.get(self.of)) is None:
            return None
        (begins, chosen), units = given, -(-counts // self.unit)
        own = remembered.held[:, :, : int(units.max(initial=0)), 0].to(begins.device)  # layers may lie on several
        stretch = torch.searchsorted(begins.contiguous(), own.contiguous(), right=True) - 1
        theirs = torch.from_numpy(chosen.mask[:, :, 0]).to(begins.device)
        read = theirs.gather(2, stretch.clamp(min=0)).cpu().numpy()
        place = np.arange(read.shape[-1])
        return _chosen(read | (place == 0) | (place == units[..., None] - 1), units)


def _best(worth: Float[Tensor, "B H N"], number: Int[np.ndarray, "B H"], share: float) -> Bool[Tensor, "B H N"]:
    """So much of each row's `number` units, at least one, and its first and last."""
    wanted = torch.from_numpy(np.maximum((number * share).astype(np.int64), 1)).to(worth.device)
    best: Tensor = top_mask(worth, wanted)
    at, last = torch.arange(worth.shape[-1], device=worth.device), torch.from_numpy(number - 1).to(worth.device)
    return best | (at == 0) | (at == last[..., None])


def _chosen(read: Bool[np.ndarray, "B H N"], units: Int[np.ndarray, "B H"]) -> Chosen:
    """Those of a row's units that are read, one list for all query heads of a group."""
    return Chosen.of((read & (np.arange(read.shape[-1]) < units[..., None]))[:, :, None])


register("stretches", Stretches)
register("of-stretches", OfStretches)
