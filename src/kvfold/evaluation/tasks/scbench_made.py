"""SCBench's made tasks (arXiv:2412.10319) at any length: one context, several queries, for the shared-context modes.

The paper has 5 queries a session and some 100 sessions; 10 sessions here. All the queries of a conversation, rightly
answered, fit into the length together. The wording of prefix_suffix is ours: the paper does not give it.
"""

import random
from collections.abc import Iterator, Sequence
from string import ascii_letters, digits

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._chains import BEFORE, draw_chains, hide
from kvfold.evaluation.tasks._draws import at_least, new
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks._numbers import KINDS, answer, draw_numbers
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.retrieval import KV, pairs_of

PAPER = "2412.10319"
SAMPLES = 10
ENDS = 12
"""Letters of the prefix and of the suffix that are given."""


def spread(rng: random.Random, count: int, turns: int) -> list[int]:
    """Places that are asked for, one in each of `turns` equal parts of `count`, in random order."""
    places = [rng.randrange(count * turn // turns, count * (turn + 1) // turns) for turn in range(turns)]
    rng.shuffle(places)
    return places


@task("scbench/kv", title="SCBench Retr.KV: several keys of one JSON object", paper=PAPER)
def kv(setting: Setting, *, turns: int = 5) -> Iterator[Example]:
    """UUIDs, 2,500 pairs in the paper."""
    at_least(1, turns=turns)

    def build(index: int, units: int) -> Example:
        rng = setting.rng("scbench/kv", index)
        rows = pairs_of(rng, units)
        places = spread(setting.rng("scbench/kv", index, "asked"), units, turns)
        queries = [
            Query(f'\n\nKey: "{rows[place][0]}"\nThe value associated with the specified key is: ', (rows[place][1],),
                  "scbench/contains", max_new_tokens=150, info={"depth": place / max(units - 1, 1)})
            for place in places
        ]  # fmt: skip
        context = KV + "{" + ", ".join(f'"{key}": "{value}"' for key, value in rows) + "}"
        return Example(str(index), context, tuple(queries), info={"pairs": units})

    return filled(setting, "scbench/kv", build, samples=SAMPLES, least=turns)


@task("scbench/prefix_suffix", title="SCBench Retr.Prefix-Suffix: strings of which the ends are known", paper=PAPER)
def prefix_suffix(setting: Setting, *, turns: int = 5) -> Iterator[Example]:
    """Random strings of 65 to 122 letters and digits, 6,000 in the paper; no two share their first or last twelve."""
    at_least(1, turns=turns)

    def build(index: int, units: int) -> Example:
        rng = setting.rng("scbench/prefix_suffix", index)
        strings = _strings(rng, units)
        queries = []
        for place in spread(setting.rng("scbench/prefix_suffix", index, "asked"), units, turns):
            whole = strings[place]
            text = f'\n\nPrefix: "{whole[:ENDS]}"\nSuffix: "{whole[-ENDS:]}"\nThe string with these ends is: '
            info = {"depth": place / max(units - 1, 1)}
            queries.append(Query(text, (whole,), "scbench/contains", max_new_tokens=150, info=info))
        before = "Below is a dictionary of strings. Find the string that has the given prefix and suffix.\n\n"
        return Example(str(index), before + "\n".join(strings), tuple(queries), info={"strings": units})

    return filled(setting, "scbench/prefix_suffix", build, samples=SAMPLES, least=turns)


def _strings(rng: random.Random, count: int) -> list[str]:
    letters, ends, made = ascii_letters + digits, set[str](), list[str]()

    def draw(rng: random.Random) -> str:
        return "".join(rng.choices(letters, k=rng.randint(65, 122)))

    while len(made) < count:
        string = new(rng, draw, ())
        if string[:ENDS] not in ends and string[-ENDS:] not in ends:
            ends |= {string[:ENDS], string[-ENDS:]}
            made.append(string)
    return made


@task("scbench/multihop", title="SCBench Retr.MultiHop: several variables followed through one text", paper=PAPER)
def multihop(setting: Setting, *, turns: int = 5, chains: int = 5, hops: int = 2) -> Iterator[Example]:
    """RULER's variable tracking; one chain a query, where the paper states two chains for five queries."""
    at_least(1, turns=turns, hops=hops)
    at_least(turns, chains=chains)

    def build(index: int, units: int) -> Example:
        rng = setting.rng("scbench/multihop", index)
        made = draw_chains(rng, chains, hops, 5)
        asked = rng.sample(made, turns)
        context = BEFORE + hide(rng, made, units)
        return Example(str(index), context, tuple(chain.query("scbench/variables") for chain in asked))

    return filled(setting, "scbench/multihop", build, samples=SAMPLES, least=hops + 1)


@task("scbench/math_find", title="SCBench Math.Find: several questions about one list of numbers", paper=PAPER)
def math_find(setting: Setting, *, turns: int = 5) -> Iterator[Example]:
    """Numbers of three digits, 30,000 in the paper; the seven questions of InfiniteBench in random order."""
    if not 1 <= turns <= len(KINDS):
        raise ValueError(f"turns={turns} must be 1 to {len(KINDS)}, as many as there are questions")

    def build(index: int, units: int) -> Example:
        rng = setting.rng("scbench/math_find", index)
        kinds = rng.sample(KINDS, turns)
        numbers = draw_numbers(rng, units, rng.randint(100, 279), rng.randint(820, 999))
        queries = tuple(_asked(kind, numbers) for kind in kinds)
        context = f"Below is a list of numbers. I will ask you about it.\n\n{numbers}"
        return Example(str(index), context, queries, info={"numbers": len(numbers)})

    return filled(setting, "scbench/math_find", build, samples=SAMPLES, least=7)


def _asked(kind: str, numbers: Sequence[int]) -> Query:
    text = (
        f"\n\nWhat is the {kind}?\n\n"
        f"You should answer with only one number, no other words. The {kind} of the list is: "
    )
    found = (str(answer(kind, numbers)),)
    return Query(text, found, "scbench/math_find", max_new_tokens=5, info={"kind": kind})
