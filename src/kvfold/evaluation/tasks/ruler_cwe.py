"""RULER's common words (arXiv:2404.06654): which ten words of a long numbered list are there most often?

Prompt and counts are those of NVIDIA/RULER: 30 times against 3, below a length of 4,096 six times against once.
Differs from the code: no common word is part of another, lists are shuffled anew for each example, and where the
words (8,166 in wonderwords 3.0) don't suffice, pairs of them ("amber-anchor") go on instead of a second list of words.
"""

import random
from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import apart, new
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks._words import wonderwords
from kvfold.evaluation.tasks.base import Setting, task

NAME = "ruler/cwe"
COMMON = 10
BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
PREFIX = " Answer: The top 10 words that appear most often in the list are:"


@task(NAME, title="RULER cwe: the ten most common words of a list", paper="2404.06654")
def cwe(setting: Setting) -> Iterator[Example]:
    """500 examples in the paper, 20 here where none are asked for."""
    length, _ = setting.need(NAME, 20)
    short = length < 4096
    (often, rarely), shown = ((6, 1), (20, 3, 1)) if short else ((30, 3), (40, 10, 3))

    def build(index: int, units: int) -> Example:
        rng = setting.rng(NAME, index)
        example, answers = _listed(rng, *shown)
        text, common = _listed(rng, units, often, rarely)
        context = f"{BEFORE}{example}{QUESTION}{PREFIX} {_numbered(answers)}\n{BEFORE}{text}"
        return Example(str(index), context, (Query(QUESTION, tuple(common), "contains_all", PREFIX, 120),))

    return filled(setting, NAME, build, least=COMMON + 1)


def _listed(rng: random.Random, count: int, often: int, rarely: int) -> tuple[str, list[str]]:
    """A numbered list of `count` distinct words, and the common ones."""
    pool = wonderwords("noun", "adjective", "verb")
    common = apart(rng, lambda rng: rng.choice(pool), COMMON)
    drawn = [word for word in rng.sample(pool, min(count, len(pool))) if word not in common][: count - COMMON]
    taken = {*common, *drawn}
    while len(taken) < count:
        taken.add(pair := new(rng, lambda rng: f"{rng.choice(pool)}-{rng.choice(pool)}", taken))
        drawn.append(pair)
    words = common * often + drawn * rarely
    rng.shuffle(words)
    return _numbered(words), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, start=1))
