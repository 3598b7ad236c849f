"""Lists of numbers and what is asked about them (InfiniteBench's math_find, arXiv:2402.13718)."""

import random
from collections.abc import Sequence

KINDS = (
    "largest number",
    "second largest number",
    "third largest number",
    "smallest number",
    "second smallest number",
    "third smallest number",
    "median number",
)
_RANKS = ("second", "third")


def answer(kind: str, numbers: Sequence[int]) -> int:
    """Second and third skip duplicates; the list of a median has an odd length."""
    if kind == "median number":
        return sorted(numbers)[len(numbers) // 2]
    rank = _RANKS.index(kind.split()[0]) + 1 if kind.split()[0] in _RANKS else 0
    return sorted(set(numbers), reverse="largest" in kind)[rank]


def bounds(rng: random.Random, kind: str, low: int, high: int) -> tuple[int, int]:
    """The range to draw from, narrowed by up to a fifth where the answer lies, so that no two lists share it."""
    upper = "largest" in kind or (kind == "median number" and rng.random() < 0.5)
    fifth = (high - low) // 5
    return (low, rng.randint(high - fifth, high)) if upper else (rng.randint(low, low + fifth), high)


def draw_numbers(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    """An odd number of numbers, at least four different ones."""
    numbers = [rng.randint(low, high) for _ in range(count + 1 - count % 2)]
    while len(set(numbers)) < 4:
        numbers = [rng.randint(low, high) for _ in numbers]
    return numbers
