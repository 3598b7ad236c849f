"""What every query reads, whatever an index says."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from kvfold.formats import register
from kvfold.options import check_int, check_number


@runtime_checkable
class Exempt(Protocol):
    """A rule for what is read at every step. All of it counts in the budget; the newest unit is in it."""

    def __hash__(self) -> int: ...

    def units(self, unit: int, units: Int[np.ndarray, "B H"], room: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H N"]:
        """Of rows with so many units of `unit` tokens, where a query reads `room` of them; padding is not read."""
        ...


@dataclass(frozen=True)
class Always:
    """The unit that still grows, or was the last to grow, then the first `sinks` and the last `recent` tokens.

    All of it counts in the budget. Sinks and recent tokens take at most `share` of it together, and get fewer in the
    same proportion where they would take more, so that a small budget is not all of them; sinks go before recent ones
    where it does not reach for both, and are rounded up: without any of them a model loses its way.
    """

    sinks: int = 0
    recent: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, 0)
        check_int("recent", self.recent, 0)
        check_number("share", self.share, 0.0, 1.0)

    def most(self, unit: int) -> tuple[int, int]:
        """Units of sinks, and of recent tokens, where the budget has room for all of them."""
        return -(-self.sinks // unit), -(-self.recent // unit)

    def units(self, unit: int, units: Int[np.ndarray, "B H"], room: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H N"]:
        """See `Exempt.units`."""
        return ends(units, *self.spans(unit, room))

    def spans(self, unit: int, room: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Units at a row's front, and before its newest, where a query reads `room` of them."""
        first, last = self.most(unit)
        most = np.maximum(room - 1, 0)
        if self.share < 1 and first + last:
            allowed = np.minimum((most * self.share).astype(np.int64), first + last)
            first_of = -(-allowed * first // (first + last))
            last_of = allowed - first_of
        else:
            first_of, last_of = (np.full(len(room), number) for number in (first, last))
        first_of = np.minimum(first_of, most)
        return first_of, np.minimum(last_of, most - first_of)


@dataclass(frozen=True)
class Proportions:
    """The newest unit, the first `sinks` tokens, and of what the budget has left the last `recent` of it (PQCache).

    Sinks take at most `most` of the budget. Everything rounds down.
    """

    sinks: int = 32
    recent: float = 0.5
    most: float = 0.25

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, 0)
        check_number("recent", self.recent, 0.0, 1.0)
        check_number("most", self.most, 0.0, 1.0)

    def units(self, unit: int, units: Int[np.ndarray, "B H"], room: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H N"]:
        """See `Exempt.units`."""
        left = np.maximum(room - 1, 0)
        first = np.minimum(-(-self.sinks // unit), (left * self.most).astype(np.int64))
        return ends(units, first, ((left - first) * self.recent).astype(np.int64))


def ends(
    units: Int[np.ndarray, "B H"], first: Int[np.ndarray, " B"], last: Int[np.ndarray, " B"]
) -> Bool[np.ndarray, "B H N"]:
    """The `first` of so many units, the newest, and `last` before it."""
    place = np.arange(int(units.max(initial=0)))
    behind = units[..., None] - 1 - place
    wanted = (place < first[:, None, None]) | (behind <= last[:, None, None])
    read: np.ndarray = wanted & (behind >= 0)
    return read


register("always", Always)
register("proportions", Proportions)
