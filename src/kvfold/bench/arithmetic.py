"""What the cores can do with numbers that need not be read from memory: the other bound of attention."""

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from typing import Any

import torch

from kvfold.bench.machine import Spread, spread, timed
from kvfold.ops.cpu import bits, library, threads

CPU = torch.device("cpu")
PASSES = 400
"""Over the numbers of one task: half a millisecond, long beside handing it out."""
TASKS = 4
"""For each thread, so that one which is held up leaves its work to the others."""
CHAIN = 1 << 20
"""Operations that wait for each other: a third of a millisecond."""


@dataclass(frozen=True)
class Arithmetic:
    """What is done with each number of a key or a value: it is widened once, and multiplied for every head of a group.

    `numbers_per_second` of all threads, from the first cache; `per_cycle` of one core, where `hertz` are the cycles
    that it made meanwhile.
    """

    dtype: str
    group: int
    numbers_per_second: float
    hertz: float
    per_cycle: float
    seconds: Spread

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class ArithmeticRate:
    """Widening and multiplying alone, measured between a benchmark's rounds; nothing where no kernels are compiled.

    A group of more heads than one pass takes is gone through in several.
    """

    def __init__(self, kinds: list[tuple[str, int]]):
        self.kernels = library()
        self.taken: dict[tuple[str, int], list[float]] = {kind: [] for kind in kinds if self.kernels is not None}
        self.hertz: list[float] = []

    def sample(self) -> None:
        """Each (dtype, group) once, and the clock of a core."""
        kernels = self.kernels
        if kernels is None:
            return
        for (dtype, group), taken in self.taken.items():
            x = bits(torch.ones(kernels.FEW, dtype=getattr(torch, dtype)))
            rounds = ceil(group / kernels.GROUP)
            heads, tasks = ceil(group / rounds), TASKS * threads()
            seconds = timed(partial(kernels.multiply_add, x, 1e-3, heads, PASSES, tasks, threads()), CPU)
            taken.append(seconds * rounds / (tasks * PASSES * kernels.FEW))
        self.hertz.append(CHAIN / timed(lambda: kernels.chain(CHAIN), CPU))

    def found(self) -> list[Arithmetic]:
        """By medians."""
        return [self.of(dtype, group) for dtype, group in self.taken]

    def of(self, dtype: str, group: int) -> Arithmetic:
        """Of one kind, which must have been measured."""
        taken, hertz = spread(self.taken[dtype, group]), statistics.median(self.hertz)
        rate = 1 / taken.median
        return Arithmetic(dtype, group, rate, hertz, rate / hertz / threads(), taken)
