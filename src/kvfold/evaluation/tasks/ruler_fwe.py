"""RULER's frequent words (arXiv:2404.06654): which three coded words are the most frequent, besides the dots?

The word of rank k stands `int(N k^-2 / zeta(2))` times; rank 1 is "...". Prompt and counts are those of NVIDIA/RULER;
N is the largest that fits, where the code goes down in steps of 1/32 of the length.
"""

from collections.abc import Iterator
from math import pi
from string import ascii_lowercase

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import distinct
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task

NAME = "ruler/fwe"
NEW = 50
LEAST = 53
"""From here on the fourth word is more frequent than the fifth."""
BEFORE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def counts(total: int, ranks: int) -> list[int]:
    """How often the words of ranks 1, 2, ... stand in a text of about `total` words."""
    return [int(total / rank**2 / (pi**2 / 6)) for rank in range(1, ranks + 1)]


@task(NAME, title="RULER fwe: the three most frequent coded words", paper="2404.06654")
def fwe(setting: Setting) -> Iterator[Example]:
    """500 examples in the paper, 20 here where none are asked for."""
    length, _ = setting.need(NAME, 20)
    ranks = max((length - NEW) // 50, 5)

    def build(index: int, units: int) -> Example:
        rng = setting.rng(NAME, index)
        vocabulary = ["...", *distinct(rng, lambda rng: "".join(rng.choices(ascii_lowercase, k=6)), ranks - 1)]
        words = [word for word, often in zip(vocabulary, counts(units, ranks), strict=True) for _ in range(often)]
        rng.shuffle(words)
        query = Query(QUESTION, tuple(vocabulary[1:4]), "contains_all", PREFIX, NEW)
        return Example(str(index), BEFORE + " ".join(words), (query,))

    return filled(setting, NAME, build, least=LEAST)
