"""The graded pass key of longctx_bench (arXiv:2407.01527): 7 digits, or 64, planted in running text.

Prompt of henryzhongsc/longctx_bench. Differs from the code: lengths are tokens, not words, and fill the prompt; the
answer may take as many tokens as the key can, not always 256.
"""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import at_least, depths_of
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.texts import check_once, running_text

NAME = "longctx/passkey"
BEFORE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
DEPTHS = tuple(k / 9 for k in range(10))


@task(NAME, title="A pass key of 7 or 64 digits in running text", paper="2407.01527")
def passkey(setting: Setting, *, digits: int = 7, depths: tuple[float, ...] = DEPTHS) -> Iterator[Example]:
    """Scored whole up to 16 digits, by the longest common part beyond. Three examples a depth in the paper and here."""
    at_least(1, digits=digits)
    places = depths_of(depths)
    metric = "longctx/exact" if digits <= 16 else "longctx/partial"

    def build(index: int, units: int) -> Example:
        depth = places[index % len(places)]
        key = "".join(setting.rng(NAME, digits, index).choices("0123456789", k=digits))
        words = " ".join(running_text(setting).first(units)).split(" ")
        place, needle = int(units * depth), NEEDLE.format(key=key)
        content = " ".join([*words[:place], needle, *words[place:]])
        check_once(setting, content, needle)
        query = Query("\nWhat is the pass key?", (key,), metric, " The pass key is ", max_new_tokens=2 * digits + 8)
        return Example(str(index), BEFORE + content, (query,), chat=False, info={"depth": depth, "words": units})

    return filled(setting, NAME, build, samples=3 * len(places))
