"""As much filler as fits: the one place where examples get their length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from kvfold.evaluation.examples import Example
from kvfold.evaluation.tasks.base import Setting

PATIENCE = 12
"""Guesses by interpolation before plain halving; each is one pass of the tokenizer over the prompt."""


def tokens_needed(setting: Setting, example: Example) -> int:
    """Tokens of prompt and answer.

    With several queries: of the whole conversation, each query answered rightly, so that no query alone needs more.
    """
    first, *later = example.queries
    needed = setting.count(example.context + first.text + first.prefix)
    needed += sum(setting.count(query.text + query.prefix) for query in later)
    needed += sum(setting.count(" " + ", ".join(query.answers)) for query in example.queries[: len(later)])
    return needed + max(query.max_new_tokens for query in example.queries)


@dataclass
class Fit:
    """Finds the largest number of filler units, from `least` to `most`, whose example needs at most `length` tokens.

    Bisection, each guess interpolated: what one example took is where the search for the next one begins.
    """

    setting: Setting
    name: str
    length: int
    guess: int = 0
    _needs: dict[int, int] = field(default_factory=dict)

    def __call__(self, make: Callable[[int], Example], least: int, most: int | None = None) -> Example:
        """The example of that size. Raises ValueError where even the least filler is too much."""
        self._needs.clear()
        made: dict[int, Example] = {}

        def needs(units: int) -> int:
            if units not in self._needs:
                made[units] = make(units)
                self._needs[units] = tokens_needed(self.setting, made[units])
            return self._needs[units]

        ceiling = None if most is None else max(most, least)
        units = max(self.guess, least) if ceiling is None else min(max(self.guess, least), ceiling)
        if needs(units) <= self.length:
            low = self._grow(needs, units, ceiling)
        else:
            if needs(least) > self.length:
                raise ValueError(
                    f"length={self.length} is too short for task {self.name}: its smallest example needs "
                    f"{needs(least)} tokens, prompt and answer together"
                )
            low = self._between(needs, least, units)
        self.guess = low
        return made[low]

    def _grow(self, needs: Callable[[int], int], low: int, ceiling: int | None) -> int:
        """From a size that fits upwards, by the room that is left over what a unit has cost so far."""
        before, step = low, 1
        while ceiling is None or low < ceiling:
            if before < low:
                cost = max((needs(low) - needs(before)) / (low - before), 0.05)
                step = max(int((self.length - needs(low)) / cost), 1)
            high = low + step + 1 if ceiling is None else min(low + step + 1, ceiling)
            if needs(high) > self.length:
                return self._between(needs, low, high)
            before, low = low, high
        return low

    def _between(self, needs: Callable[[int], int], low: int, high: int) -> int:
        """The largest that fits, `low` fits and `high` does not."""
        for turn in range(10_000):
            if high - low <= 1:
                break
            share = (self.length - needs(low)) / (needs(high) - needs(low)) if turn % 3 < 2 else 0.5
            share = share if turn < PATIENCE else 0.5
            middle = min(max(low + int((high - low) * share), low + 1), high - 1)
            low, high = (middle, high) if needs(middle) <= self.length else (low, middle)
        return low


Build = Callable[[int, int], Example]
"""(index of the example, filler units) to the example; the same every time it is called."""


def filled(
    setting: Setting, name: str, build: Build, *, samples: int = 20, least: int = 1, most: int | None = None,
    limit: int | None = None,
) -> Iterator[Example]:  # fmt: skip
    """Examples of a task, each with as much filler as its length allows; `info` has the length. `limit`: at most."""
    length, count = setting.need(name, samples)
    count = count if limit is None else min(count, limit)
    fit = Fit(setting, name, length)
    for index in range(count):

        def make(units: int, index: int = index) -> Example:
            example = build(index, units)
            return replace(example, info={"length": length, **example.info})

        yield fit(make, least, most)
