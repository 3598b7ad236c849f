"""Scores of questions about long conversations: EpiCache's (arXiv:2509.17396) and LoCoMo's (arXiv:2402.17753)."""

import re
from functools import cache
from statistics import fmean
from typing import Any

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import metric

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS = {word: str(digit) for digit, word in enumerate(_NUMBERS)}
_NUMBER_WORD = re.compile(rf"\b({'|'.join(_DIGITS)})\b")
CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}


def _words(text: str) -> list[str]:
    return _NUMBER_WORD.sub(lambda found: _DIGITS[found[0]], _text.normalize(text)).split()


@metric("convqa/f1", title="token F1 with number words as digits (EpiCache)")
def f1(prediction: str, query: Query) -> float:
    """The same for every category: multi-hop figures are not comparable with LoCoMo's own."""
    return _text.best(lambda found, answer: _text.f1(_words(found), _words(answer)), prediction, query)


@metric("convqa/locomo", title="LoCoMo's score of the question's category")
def locomo(prediction: str, query: Query) -> float:
    """Category 1 to 5 in `query.info["category"]`: F1 of stemmed words; answers' parts between commas each against the
    best part of the prediction (1); the answer up to its ";" (3); whether the question is seen to have no answer (5).
    """
    category = _text.info(query, "category")
    if category not in CATEGORIES:
        raise ValueError(f"query.info['category']={category!r} must be one of {', '.join(map(str, CATEGORIES))}")
    if category == 5:
        return float(any(phrase in prediction.lower() for phrase in ("no information available", "not mentioned")))
    if category == 1:
        return _text.best(_by_parts, prediction, query)
    return _text.best(
        lambda found, answer: _stemmed_f1(found, answer.split(";")[0] if category == 3 else answer), prediction, query
    )


def _by_parts(prediction: str, answer: str) -> float:
    return fmean(max(_stemmed_f1(part, wanted) for part in prediction.split(",")) for wanted in answer.split(","))


def _stemmed_f1(prediction: str, answer: str) -> float:
    return _text.f1(_stems(prediction), _stems(answer))


def _stems(text: str) -> list[str]:
    words = _text.normalize(text, articles=(*_text.ARTICLES, "and")).split()
    return [_stemmer().stem(word) for word in words]


@cache
def _stemmer() -> Any:
    return _text.library("nltk.stem.porter").PorterStemmer()
