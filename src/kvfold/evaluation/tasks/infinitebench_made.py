"""InfiniteBench's made tasks (arXiv:2402.13718) at any length: extremes of a list, and calls of nested functions.

Prompts are those of OpenBMB/InfiniteBench for open models. Its pass key and digits are in `retrieval.py`.
"""

import random
from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import at_least
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks._numbers import KINDS, answer, bounds, draw_numbers
from kvfold.evaluation.tasks.base import Setting, task

FIND, RUN = "infinitebench/math_find_made", "infinitebench/code_run_made"
LEVELS = (2, 4, 6, 8, 10)


@task(FIND, title="Largest, smallest or median number of a list", paper="2402.13718")
def math_find(setting: Setting) -> Iterator[Example]:
    """Seven questions in turn about integers of 0 to 99, 50 of each in the paper, three here.

    Differs from the paper: lists have an odd length, so that no median is a fraction; five new tokens, not three.
    """

    def build(index: int, units: int) -> Example:
        rng, kind = setting.rng(FIND, index), KINDS[index % len(KINDS)]
        numbers = draw_numbers(rng, units, *bounds(rng, kind, 0, 99))
        query = Query(
            f"\n\nYou should answer with only one number, no other words. The {kind} of the list is: ",
            (str(answer(kind, numbers)),),
            "infinitebench/math_find",
            max_new_tokens=5,
        )
        context = f"What is the {kind} in the following list?\n\n{numbers}"
        return Example(str(index), context, (query,), chat=False, info={"kind": kind, "numbers": len(numbers)})

    return filled(setting, FIND, build, samples=3 * len(KINDS), least=7)


@task(RUN, title="The value of nested function calls", paper="2402.13718")
def code_run(setting: Setting, *, levels: tuple[int, ...] = LEVELS) -> Iterator[Example]:
    """A call that goes through 2, 4, 6, 8 or 10 functions of as many as fit; 80 of each in the paper, four here."""
    if not levels:
        raise ValueError("levels=() must be integers of at least 1")
    for depth in levels:
        at_least(1, levels=depth)

    def build(index: int, units: int) -> Example:
        rng, depth = setting.rng(RUN, index), levels[index % len(levels)]
        code, name, added = functions(rng, depth, units)
        x = rng.randint(-10, 10)
        call = f"{name}({x})"
        query = Query(
            f"\n\nPlease compute the exact value of {call}.",
            (str(x + added),),
            "infinitebench/code_run",
            f" The value of {call} is",
            max_new_tokens=5,
        )
        context = f"There is a function called {name} in the following Python code.\n\n{code}"
        return Example(str(index), context, (query,), chat=False, info={"levels": depth, "functions": units})

    return filled(setting, RUN, build, samples=4 * len(levels), least=max(levels))


def functions(rng: random.Random, levels: int, count: int) -> tuple[str, str, int]:
    """Source of `count` functions in the order of their numbers, the name of one, and what it adds to x.

    A function of one level returns that of a random one of the next, plus -12 to 17; the last level returns x plus it.
    """
    numbers = rng.sample(range(1, 2 * count + 1), count)
    bodies, adds = dict[int, str](), dict[int, int]()
    below: list[int] = []
    for level in reversed(range(levels)):
        floor = numbers[level::levels]
        for number in floor:
            added, called = rng.randint(-12, 17), rng.choice(below) if below else None
            inner = "x" if called is None else f"func_{called}(x)"
            bodies[number] = inner + (f" + {added}" if added > 0 else f" - {-added}" if added < 0 else "")
            adds[number] = added + (0 if called is None else adds[called])
        below = floor
    asked = rng.choice(below)
    source = "\n\n".join(f"def func_{number}(x):\n    return {bodies[number]}" for number in sorted(bodies))
    return source + "\n", f"func_{asked}", adds[asked]
