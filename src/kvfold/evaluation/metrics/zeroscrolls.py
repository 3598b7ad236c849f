"""The scores of ZeroSCROLLS (arXiv:2305.14196): each the best over the references of an example.

All but ROUGE are checked against a public copy of the official metrics, which stand beside the data set.
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import Scores, metric

KINDS = ("rouge1", "rouge2", "rougeL")


def geometric_mean(scores: Sequence[Scores]) -> float:
    """100 times the geometric mean of the three kinds' means: averaged over the examples first."""
    product = 1.0
    for kind in KINDS:
        product *= fmean(each[kind] for each in scores)
    return 100.0 * float(product ** (1 / 3))


@metric("zeroscrolls/rouge", title="geometric mean of ROUGE-1, -2 and -L (rouge_score)", aggregate=geometric_mean)
def rouge(prediction: str, query: Query) -> Scores:
    """Without stemmer (reconstructed). Sentences need not be split: only rougeLsum would see them."""
    return {kind: _text.rouge_f(prediction, query, kind) for kind in KINDS}


def _plain_words(text: str) -> list[str]:
    decomposed = unicodedata.normalize("NFKD", _text.normalize(text))
    return "".join(mark for mark in decomposed if not unicodedata.combining(mark)).split()


@metric("zeroscrolls/f1", title="token F1 with accents taken off")
def f1(prediction: str, query: Query) -> float:
    """Differs from the official metric where letters have no decomposition: Unidecode spells them in ASCII."""
    return _text.best(lambda found, answer: _text.f1(_plain_words(found), _plain_words(answer)), prediction, query)


@metric("zeroscrolls/accuracy", title="whether the first lone letter A-D is right")
def accuracy(prediction: str, query: Query) -> float:
    letter = re.compile(r"\b[A-D]\b")
    wanted = [found[0] for answer in query.answers if (found := letter.search(answer))]
    if len(wanted) < len(query.answers) or not wanted:
        raise ValueError(f"query.answers={query.answers!r} must each name a letter A to D for metric {query.metric}")
    found = letter.search(prediction)
    return float(found is not None and found[0] in wanted)


def _percentage(text: str) -> float | None:
    found = re.search(r"(\d+\.?\d*)%", text)
    return float(found[1]) if found else None


@metric("zeroscrolls/exp_similarity", title="halved with each 10 percentage points between prediction and answer")
def exp_similarity(prediction: str, query: Query) -> float:
    """Of the first percentages that prediction and answer name; 0 where the prediction names none."""

    def score(found: str, answer: str) -> float:
        predicted, wanted = _percentage(found), _percentage(answer)
        if wanted is None:
            raise ValueError(f"query.answers={query.answers!r} must name a percentage for metric {query.metric}")
        return 0.0 if predicted is None else float(0.5 ** (abs(wanted - predicted) / 10))

    return _text.best(score, prediction, query)


def _order(text: str) -> list[int]:
    return [int(number) for number in re.sub(r"[^0-9\s,]", "", text).replace(",", " ").split()]


@metric("zeroscrolls/concordance", title="share of item pairs in the right order")
def concordance(prediction: str, query: Query) -> float:
    """0 where the prediction's integers are not the answer's, in any order."""

    def score(found: str, answer: str) -> float:
        predicted, wanted = _order(found), _order(answer)
        if len(wanted) < 2 or sorted(wanted) != list(range(1, len(wanted) + 1)):
            raise ValueError(f"query.answers={query.answers!r} must order the numbers 1 to n >= 2 each")
        if sorted(predicted) != sorted(wanted):
            return 0.0
        place = {item: at for at, item in enumerate(predicted)}
        return fmean(place[first] < place[second] for first, second in combinations(wanted, 2))

    return _text.best(score, prediction, query)
