"""How the codes of a token's key or value are to be read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Coding:
    """Vectors of `size` numbers in codes of `bits` bits.

    A number is `levels[code]` times its token's scale; or, without levels, its code times the scale and plus the zero
    of its run of channels, of which a token has `groups`.
    """

    size: int
    bits: int
    levels: tuple[float, ...] | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        assert self.levels is None or (len(self.levels) == 1 << self.bits and self.groups == 1)
        assert self.size % self.groups == 0
