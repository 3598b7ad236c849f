"""RULER's eight needle tasks (arXiv:2404.06654): magic numbers in essays, in one repeated line, among other needles.

Prompts and counts are those of NVIDIA/RULER, scripts/synthetic.yaml. Differs from the code: needles are shuffled anew
for each example, and the essays are `texts` (Paul Graham's are not licensed for redistribution).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import Draw, apart, new, number, uuid4
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks._words import wonderwords
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.texts import check_once, plant, running_text

PAPER = "2404.06654"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = tuple(round(100 * step / 39) / 100 for step in range(40))


@dataclass(frozen=True)
class Wording:
    """The prompt's parts, for one answer or for several."""

    before: str
    question: str
    prefix: str


ONE = Wording(
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
SEVERAL = Wording(
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)


def wonder_word(rng: random.Random) -> str:
    """An adjective and a noun, as RULER's keys are."""
    return f"{rng.choice(wonderwords('adjective'))}-{rng.choice(wonderwords('noun'))}"


DRAWS: dict[str, Draw] = {"words": wonder_word, "numbers": number, "uuids": uuid4}


@dataclass(frozen=True)
class Kind:
    """What hides the needles (noise, essay or needle), what they are made of, and how many there are."""

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", value="uuids"),
    "niah_multikey_1": Kind("essay", keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", key="uuids", value="uuids"),
    "niah_multivalue": Kind("essay", values=4),
    "niah_multiquery": Kind("essay", keys=4, queries=4),
}


def _example(setting: Setting, name: str, kind: Kind, index: int, units: int) -> Example:
    rng = setting.rng(f"ruler/{name}", index)
    keys = apart(rng, DRAWS[kind.key], kind.keys)
    drawn = apart(rng, DRAWS[kind.value], kind.keys * kind.values, keys)
    values = {key: drawn[i * kind.values : (i + 1) * kind.values] for i, key in enumerate(keys)}
    asked = rng.sample(keys, kind.queries)
    needles = [NEEDLE.format(kind=kind.value, key=key, value=value) for key in keys for value in values[key]]
    rng.shuffle(needles)
    if kind.haystack == "essay":
        depths = rng.sample(DEPTHS, len(needles))
        haystack = plant(running_text(setting).first(units), list(zip(depths, needles, strict=True)))
    else:
        lines = [NOISE] * units if kind.haystack == "noise" else _others(rng, kind, units, keys, drawn)
        for needle in needles:
            lines.insert(rng.randrange(units), needle)
        haystack = "\n".join(lines)
    check_once(setting, haystack, *needles)
    answers = tuple(value for key in asked for value in values[key])
    singular = len(answers) == 1
    wording = ONE if singular else SEVERAL
    words = {"kind": kind.value[:-1] if singular else kind.value, "query": _listed(asked)}
    query = Query(wording.question.format(**words), answers, "contains_all", wording.prefix.format(**words), 128)
    where = haystack.index(answers[0]) / len(haystack)
    return Example(str(index), wording.before.format(**words) + haystack, (query,), info={"depth": round(where, 4)})


def _others(rng: random.Random, kind: Kind, units: int, keys: list[str], values: list[str]) -> list[str]:
    """Needles that nobody asks for."""
    taken, lines = {*keys, *values}, list[str]()
    for _ in range(units):
        taken.add(key := new(rng, DRAWS[kind.key], taken, keys))
        taken.add(value := new(rng, DRAWS[kind.value], taken))
        lines.append(NEEDLE.format(kind=kind.value, key=key, value=value))
    return lines


def _listed(queries: list[str]) -> str:
    """ "a, b, and c"."""
    return queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"


def _maker(name: str, kind: Kind) -> Callable[[Setting], Iterator[Example]]:
    def make(setting: Setting) -> Iterator[Example]:
        """500 examples in the paper, 20 here where none are asked for."""
        return filled(setting, f"ruler/{name}", lambda index, units: _example(setting, name, kind, index, units))

    return make


for _name, _kind in KINDS.items():
    task(f"ruler/{_name}", title=f"RULER {_name}", paper=PAPER)(_maker(_name, _kind))
