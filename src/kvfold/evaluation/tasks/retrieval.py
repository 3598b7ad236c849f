"""Exact look-ups: one of many UUIDs (Lost in the Middle, arXiv:2307.03172), a pass key and a run of digits in noise
(InfiniteBench, arXiv:2402.13718)."""

import random
from collections.abc import Callable, Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._chains import NOISE
from kvfold.evaluation.tasks._draws import at_least, depths_of, distinct, uuid4
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task

KV = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it{memorize}. "
QUIZ = "I will quiz you about the important information there.\n\n"
DEPTHS = tuple(step / 10 for step in range(11))


def pairs_of(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Keys and values, all different."""
    drawn = distinct(rng, uuid4, 2 * count)
    return list(zip(drawn[::2], drawn[1::2], strict=True))


@task("kv_retrieval", title="Look one of many UUIDs up in a JSON object", paper="2307.03172")
def kv_retrieval(
    setting: Setting, *, pairs: int | None = None, depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
) -> Iterator[Example]:
    """Format and prompt of Lost in the Middle. `pairs`: None fills the length; the paper has 75, 140 and 300.

    Examples go through `depths` in turn, the place of the pair that is asked for. 500 a place in the paper, 20 here.
    The cue that ends the paper's prompt begins the answer where there is a chat template; the plain prompt is the same.
    """
    places = depths_of(depths)
    if pairs is not None:
        at_least(2, pairs=pairs)

    def build(index: int, units: int) -> Example:
        rows = pairs_of(setting.rng("kv_retrieval", index), units)
        depth = places[index % len(places)]
        place = round(depth * (units - 1))
        key, value = rows[place]
        context = KV + "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in rows) + "}"
        query = Query(f'\n\nKey: "{key}"\n', (value,), "contains_all", "Corresponding value:", max_new_tokens=64)
        return Example(str(index), context, (query,), info={"depth": depth, "position": place, "pairs": units})

    if pairs is not None and setting.length is None:
        return (build(index, pairs) for index in range(20 if setting.samples is None else setting.samples))
    return filled(setting, "kv_retrieval", build, least=pairs or 2, most=pairs)


@task("passkey", title="A pass key in repeated lines", paper="2402.13718")
def passkey(setting: Setting, *, depths: tuple[float, ...] = DEPTHS) -> Iterator[Example]:
    """A key of five digits, said twice in one line; 590 examples over 59 depths in the paper, 22 over 11 here."""
    needle = "The pass key is {key}. Remember it. {key} is the pass key."
    before = HIDDEN.format(memorize=" and memorize them") + QUIZ
    return _in_noise(setting, "passkey", before, needle, "pass key", _five, depths, 6)


@task("number_string", title="Ten digits with repetitions in repeated lines", paper="2402.13718")
def number_string(setting: Setting, *, depths: tuple[float, ...] = DEPTHS) -> Iterator[Example]:
    """Ten digits in at most five runs: a cache that blurs neighbours drops or adds one. 590 in the paper, 22 here."""
    needle = "The sequence of digits is {key}. Remember it. {key} is the sequence of digits."
    before = HIDDEN.format(memorize="") + QUIZ
    return _in_noise(setting, "number_string", before, needle, "sequence of digits", _stuttered, depths, 12)


def _five(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=5))


def _stuttered(rng: random.Random) -> str:
    digits = list(_five(rng))
    for _ in range(5):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


def _in_noise(
    setting: Setting, name: str, before: str, needle: str, what: str, draw: Callable[[random.Random], str],
    depths: tuple[float, ...], new: int,
) -> Iterator[Example]:  # fmt: skip
    """A needle among lines that are all the same, `int(lines * depth)` of them in front of it."""
    places = depths_of(depths)

    def build(index: int, units: int) -> Example:
        key, depth = draw(setting.rng(name, index)), places[index % len(places)]
        lines = [NOISE] * units
        lines.insert(int(units * depth), needle.format(key=key))
        query = Query(
            f"\n\n\nWhat is the {what}?\n\n", (key,), "infinitebench/first_int", f"The {what} is", max_new_tokens=new
        )
        return Example(str(index), before + "\n".join(lines), (query,), info={"depth": depth})

    return filled(setting, name, build, samples=2 * len(places))
