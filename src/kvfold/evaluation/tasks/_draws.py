"""Random numbers, words and uuids that can't be mistaken for one another."""

import random
import uuid
from collections.abc import Callable, Collection, Iterable

from kvfold.evaluation.tasks._words import ADJECTIVES, NOUNS

Draw = Callable[[random.Random], str]
TRIES = 10_000


def number(rng: random.Random, digits: int = 7) -> str:
    """A number of so many digits, the first of them not 0."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def word(rng: random.Random) -> str:
    """Such as "amber-anchor", of the lists that ship."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def uuid4(rng: random.Random) -> str:
    """A version 4 UUID of the seeded generator."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


DRAWS: dict[str, Draw] = {"numbers": number, "words": word, "uuids": uuid4}


def draw_of(name: str, kind: str) -> Draw:
    """The draw of a kind. Raises ValueError that names the option."""
    if kind not in DRAWS:
        raise ValueError(f"{name}={kind!r} must be one of {', '.join(map(repr, DRAWS))}")
    return DRAWS[kind]


def new(rng: random.Random, draw: Draw, taken: Collection[str], apart_from: Iterable[str] = ()) -> str:
    """A draw that is not taken, and neither holds nor is held by any of `apart_from`."""
    apart = tuple(apart_from)
    for _ in range(TRIES):
        drawn = draw(rng)
        if drawn not in taken and not any(drawn in other or other in drawn for other in apart):
            return drawn
    raise ValueError(f"too many are asked for: there is no other to draw than the {len(taken)} that are taken")


def apart(rng: random.Random, draw: Draw, count: int, others: Iterable[str] = ()) -> list[str]:
    """`count` draws, none of them a part of another or of `others`."""
    made, others = list[str](), tuple(others)
    for _ in range(count):
        made.append(new(rng, draw, made, (*made, *others)))
    return made


def distinct(rng: random.Random, draw: Draw, count: int) -> list[str]:
    """`count` draws that differ, which is enough where all are of one length."""
    made: dict[str, None] = {}
    while len(made) < count:
        made[new(rng, draw, made)] = None
    return list(made)


def depths_of(depths: object) -> tuple[float, ...]:
    """An option `depths`, checked: one number or several, each 0 (first) to 1 (last)."""
    found = tuple(depths) if isinstance(depths, tuple | list) else (depths,)
    if not found or not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in found):
        raise ValueError(f"depths={depths!r} must be numbers in [0, 1]")
    return tuple(float(depth) for depth in found)


def at_least(least: int, **options: object) -> None:
    """Raises ValueError that names the option that is too small."""
    for name, value in options.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
