"""The needle of SnapKV's, PyramidKV's and H2O's figures: what to do in San Francisco, as KVCache-Factory asks for it.

Score: share of the expected answer's words that the output has. Differs from that code: the haystack is `texts`; it
is cut by words, so that the needle stands at the sentence's beginning before int(words * depth) without token ids; the
prompt does not begin with the literal chat tag of another model.
"""

from collections.abc import Iterator

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.tasks._draws import depths_of
from kvfold.evaluation.tasks._fit import filled
from kvfold.evaluation.tasks.base import Setting, task
from kvfold.evaluation.tasks.texts import RunningText, check_once, running_text

NAME = "niah/sentence"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."
NEEDLE = f"The best thing to do in San Francisco is {ANSWER}"
BEFORE = "This is a very long story book: <book> "
QUESTION = " </book>.\n Based on the content of the book, Question: The best thing to do in San Francisco is: \nAnswer:"
DEPTHS = (0.0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1.0)


@task(NAME, title="The San Francisco needle, scored by recalled words")
def sentence(setting: Setting, *, depths: tuple[float, ...] = DEPTHS) -> Iterator[Example]:
    """One example a depth, in turn; the haystack is the beginning of the text for all of them."""
    places = depths_of(depths)

    def build(index: int, units: int) -> Example:
        depth = places[index % len(places)]
        haystack = insert(running_text(setting).first(units), depth)
        check_once(setting, haystack, NEEDLE)
        info = {"needle": NEEDLE, "depth": depth}
        query = Query(QUESTION, (ANSWER,), "niah/recall", max_new_tokens=30, stop=("\n",), info=info)
        return Example(str(index), BEFORE + haystack, (query,), chat=False, info={"depth": depth})

    return filled(setting, NAME, build, samples=len(places))


def insert(sentences: list[str], depth: float) -> str:
    """The needle, a line of its own, at the end (depth 1) or before the sentence that int(words * depth) falls in."""
    text = RunningText.of(sentences)
    place = len(sentences) if depth == 1 else sum(end <= int(text.ends[-1] * depth) for end in text.ends)
    before, after = " ".join(sentences[:place]), " ".join(sentences[place:])
    return f"{before}\n{NEEDLE}\n{after}"
