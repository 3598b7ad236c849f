"""Many-shot recall: a made-up mapping from words to labels, learned from examples in the context alone.

Nothing of it is in any training text, so that what a model answers it has from the cache.
"""

import random
from collections.abc import Iterator, Sequence

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import apart, at_least, new
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task

NAME = "fewshot"
ASKS = ("seen", "new")
BEFORE = "Every word has a label. Learn the labels from these examples.\n\n"
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


def syllables(rng: random.Random, count: int) -> str:
    """Such as "balomi"."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))


def label(rng: random.Random) -> str:
    """Such as "XOJ": capitals and letters that no word has."""
    return rng.choice("CHJQWXY") + rng.choice("AEIOU") + rng.choice("CHJQWXY")


@task(NAME, title="Labels of made-up words, from many examples")
def fewshot(setting: Setting, *, ask: str = "seen", labels: int = 4) -> Iterator[Example]:
    """A word and as many others with their labels as fit; every label stands as often as the others, give or take one.

    `ask="seen"`: a word of the examples, whose label was drawn at random (recall). `ask="new"`: a word that is not
    among them, whose last syllable decides, as it does in all of them (a rule).
    """
    if ask not in ASKS:
        raise ValueError(f"ask={ask!r} must be one of {', '.join(map(repr, ASKS))}")
    at_least(2, labels=labels)
    if labels > 40:
        raise ValueError(f"labels={labels} must be at most 40")

    def build(index: int, units: int) -> Example:
        rng = setting.rng(NAME, ask, index)
        names = apart(rng, label, labels)
        endings = apart(rng, lambda rng: syllables(rng, 1), labels)
        words = _words(rng, units + labels, names, endings, ask == "new")
        shown, spare = words[:units], words[units:]
        shuffler = setting.rng(NAME, ask, index, "order")
        shuffler.shuffle(shown)
        place = shuffler.randrange(units)
        word, name = shown[place] if ask == "seen" else shuffler.choice(spare)
        lines = [f"Word: {word}\nLabel: {name}" for word, name in shown]
        query = Query(f"\n\nWord: {word}\n", (name,), "contains_any", "Label:", 8, stop=("\n",), info={"word": word})
        info = {"examples": units} | ({"depth": place / max(units - 1, 1)} if ask == "seen" else {})
        return Example(str(index), BEFORE + "\n\n".join(lines), (query,), info=info)

    return filled(setting, NAME, build, least=labels)


def _words(
    rng: random.Random, count: int, names: Sequence[str], endings: Sequence[str], rule: bool
) -> list[tuple[str, str]]:
    """Distinct words of six or eight letters with the labels in turn, so that no prefix of them is unbalanced."""
    made: dict[str, str] = {}

    def draw(rng: random.Random) -> str:
        ending = endings[len(made) % len(names)] if rule else syllables(rng, 1)
        return syllables(rng, 3) + ending

    for _ in range(count):
        made[new(rng, draw, made)] = names[len(made) % len(names)]
    return list(made.items())
