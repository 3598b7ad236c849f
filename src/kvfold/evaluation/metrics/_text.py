"""What several benchmarks' scores share: normalised words, token F1, cutting, and the best over several answers."""

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from kvfold.evaluation.examples import Query

ARTICLES = ("a", "an", "the")

# ASCII punctuation and, as closed ranges, the Chinese and typographic marks that the Chinese sets ignore.
_MARKS = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
_PUNCTUATION = {ord(mark): None for mark in string.punctuation}
_ALL_PUNCTUATION = _PUNCTUATION | {code: None for first, last in _MARKS for code in range(first, last + 1)}


def library(name: str) -> Any:
    """An optional package, imported where a metric first needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise ImportError(f'this metric needs {package}: pip install "kvfold[eval]"') from error


def info(query: Query, name: str) -> Any:
    """An entry of `query.info`. Raises ValueError that names it where it is missing."""
    if name not in query.info:
        known = ", ".join(map(repr, query.info)) or "nothing"
        raise ValueError(f"query.info must have {name!r} for metric {query.metric}; it has {known}")
    return query.info[name]


def gold(query: Query) -> str:
    """The first answer, for metrics that have one."""
    if not query.answers:
        raise ValueError(f"query.answers={query.answers!r} must hold at least one answer for metric {query.metric}")
    return query.answers[0]


def best(score: Callable[[str, str], float], prediction: str, query: Query) -> float:
    """The maximum of a score over the answers."""
    gold(query)
    return float(max(score(prediction, answer) for answer in query.answers))


def normalize(text: str, *, articles: Sequence[str] = ARTICLES, gap: str = " ", lower: bool = True) -> str:
    """SQuAD's normal form (arXiv:1606.05250): lower case, no ASCII punctuation, articles to `gap`, single blanks."""
    text = (text.lower() if lower else text).translate(_PUNCTUATION)
    return " ".join(re.sub(rf"\b({'|'.join(articles)})\b", gap, text).split())


def normalize_zh(text: str) -> str:
    """Lower case, without Western and Chinese punctuation and without any blank."""
    return "".join(text.lower().translate(_ALL_PUNCTUATION).split())


def f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two multisets of tokens; 0 where they share none."""
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def word_f1(prediction: str, answer: str) -> float:
    """F1 of the words of the normal form."""
    return f1(normalize(prediction).split(), normalize(answer).split())


def character_f1(prediction: str, answer: str) -> float:
    """F1 of the characters of the Chinese normal form."""
    return f1(normalize_zh(prediction), normalize_zh(answer))


def blank(text: str, marks: str) -> str:
    """Each of these characters to a blank."""
    return text.translate({ord(mark): " " for mark in marks})


def first_line(text: str) -> str:
    """What stands before the first newline, leading newlines left out."""
    return text.lstrip("\n").split("\n")[0]


def first_digits(text: str) -> str:
    """The first run of ASCII digits, or nothing."""
    found = re.search("[0-9]+", text)
    return found[0] if found else ""


def same_number(prediction: str, answer: str) -> float:
    """Whether the first number, whole or decimal, is the answer; a whole answer is compared with the whole part."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    return float(float(found[0]) == float(answer) if "." in answer else int(float(found[0])) == int(answer))


def rouge_f(prediction: str, query: Query, kind: str, *, stemmer: bool = False) -> float:
    """F of one kind of ROUGE by Google's `rouge_score`, the maximum over the answers."""
    gold(query)
    return float(_rouge_scorer(kind, stemmer).score_multi(list(query.answers), prediction)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str, stemmer: bool) -> Any:
    return library("rouge_score.rouge_scorer").RougeScorer([kind], use_stemmer=stemmer)
