"""Chains of variables: `VAR A = 12345`, `VAR B = VAR A`, ..., lines of a text in which nothing else is said."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from kvfold.evaluation.examples import Query
from kvfold.evaluation.tasks._draws import apart

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are: "
)


@dataclass(frozen=True)
class Chain:
    """The value of the first name; every further name is assigned the one before."""

    value: str
    names: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """RULER's lines; all but the first end with a blank, as they do there."""
        later = [f"VAR {name} = VAR {before} " for before, name in zip(self.names, self.names[1:], strict=False)]
        return [f"VAR {self.names[0]} = {self.value}", *later]

    @property
    def question(self) -> str:
        return QUESTION.format(value=self.value)

    @property
    def prefix(self) -> str:
        return PREFIX.format(value=self.value, count=len(self.names))

    def query(self, metric: str) -> Query:
        """All names that have the value, in 30 tokens."""
        return Query(self.question, self.names, metric, self.prefix, 30)


def draw_chains(
    rng: random.Random, chains: int, hops: int, letters: int, apart_from: Sequence[Chain] = ()
) -> list[Chain]:
    """Chains of `hops + 1` names; no name is part of another, no value occurs twice."""
    used = [part for chain in apart_from for part in (chain.value, *chain.names)]
    names = apart(rng, lambda rng: "".join(rng.choices(ascii_uppercase, k=letters)), chains * (hops + 1), used)
    values = apart(rng, lambda rng: str(rng.randint(10_000, 99_998)), chains, used)
    return [Chain(value, tuple(names[i * (hops + 1) : (i + 1) * (hops + 1)])) for i, value in enumerate(values)]


def hide(rng: random.Random, chains: Sequence[Chain], noise: int) -> str:
    """The chains' lines in `noise` lines, one chain after the other: each in its order, several interleaved."""
    lines = [NOISE] * noise
    for chain in chains:
        for moved, (place, line) in enumerate(zip(_places(rng, len(lines), chain), chain.lines, strict=True)):
            lines.insert(place + moved, line)
    return "\n".join(lines)


def _places(rng: random.Random, lines: int, chain: Chain) -> list[int]:
    return sorted(rng.sample(range(lines), len(chain.names)))
