"""Needles in running text, on a grid of lengths and depths: the task that shows first what a method forgets.

After Greg Kamradt's LLMTest_NeedleInAHaystack (2023). The question stands at the end and the answer is begun, so that
small models answer too.
"""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import apart, at_least, depths_of, draw_of
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks._words import CITIES
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.texts import check_once, plant, running_text

NAME = "niah"
BEFORE = "Some special magic {kind} are hidden in the following text. Remember them: I will ask for them.\n\n"
NEEDLE = "The special magic {kind} for {key} is {value}."


@task(NAME, title="Needles in running text")
def niah(
    setting: Setting, *, keys: int = 1, values: int = 1, queries: int = 1, kind: str = "numbers",
    depths: tuple[float | int, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
) -> Iterator[Example]:  # fmt: skip
    """Examples go through `depths` in turn: there stands the first needle that is asked for, the others anywhere.

    `keys` cities with `values` each are hidden, of which `queries` are asked for in one question. `kind`: "numbers"
    (7 digits), "words" (a pair of words) or "uuids". Each example's haystack begins at another sentence of the text.
    """
    at_least(1, keys=keys, values=values, queries=queries)
    draw, places = draw_of("kind", kind), depths_of(depths)
    if not queries <= keys <= len(CITIES):
        raise ValueError(f"keys={keys} must be from queries={queries} to {len(CITIES)}")

    def build(index: int, units: int) -> Example:
        rng, depth, text = setting.rng(NAME, index), places[index % len(places)], running_text(setting)
        cities = rng.sample(CITIES, keys)
        drawn = apart(rng, draw, keys * values)
        start = rng.randrange(len(text.sentences))
        spread = [depth, *(rng.random() for _ in range(keys * values - 1))]
        owners = [city for city in cities for _ in range(values)]
        needles = [
            NEEDLE.format(kind=kind[:-1], key=key, value=value) for key, value in zip(owners, drawn, strict=True)
        ]
        haystack = plant(text.turned(start).first(units), list(zip(spread, needles, strict=True)))
        check_once(setting, haystack, *needles)
        query = _query(kind, cities[:queries], drawn[: queries * values], values)
        return Example(str(index), BEFORE.format(kind=kind) + haystack, (query,), info={"depth": depth})

    return filled(setting, NAME, build)


def _query(kind: str, cities: list[str], answers: list[str], values: int) -> Query:
    one = len(cities) == values == 1
    what = f"special magic {kind[:-1]}{'' if one else 's'} for {' and '.join(cities)}"
    verb = "is" if one else "are"
    new = {"numbers": 12, "words": 10, "uuids": 44}[kind] * len(answers) + 4
    return Query(f"\n\nWhat {verb} the {what}?\n", tuple(answers), prefix=f"The {what} {verb}", max_new_tokens=new)
