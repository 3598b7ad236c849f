"""The scores of LongBench (arXiv:2308.14508) and LongBench v2 (arXiv:2412.15204).

Where `query.info["first_line"]` is true the prediction is cut to its first line, as the official script does for trec,
triviaqa, samsum and lsht. A sample's score is the maximum over its answers.
"""

import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import metric


def _best(score: Callable[[str, str], float], prediction: str, query: Query) -> float:
    cut = _text.first_line(prediction) if query.info.get("first_line") else prediction
    return _text.best(score, cut, query)


@cache
def _cut_words() -> Any:
    jieba = _text.library("jieba")
    jieba.setLogLevel(logging.WARNING)  # it tells on stderr how long its dictionary took
    return jieba.lcut


def _words_zh(text: str) -> list[str]:
    words = (_text.normalize_zh(word) for word in _cut_words()(text))
    return [word for word in words if word]


def _rouge_l(prediction: str, answer: str) -> float:
    try:
        (scores,) = _text.library("rouge").Rouge().get_scores([prediction], [answer])
    except (ValueError, RecursionError):  # an empty text, or a "sentence" of about a thousand words: officially 0
        return 0.0
    return float(scores["rouge-l"]["f"])


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _numbered(query: Query, pattern: str) -> str:
    found = re.search(pattern, _text.gold(query))
    if found is None:
        raise ValueError(f"query.answers={query.answers!r} must match {pattern!r} for metric {query.metric}")
    return found[1]


@metric("longbench/f1", title="token F1 (LongBench's English QA)")
def f1(prediction: str, query: Query) -> float:
    return _best(_text.word_f1, prediction, query)


@metric("longbench/f1_zh", title="F1 of jieba's words (LongBench's Chinese QA)")
def f1_zh(prediction: str, query: Query) -> float:
    return _best(lambda found, answer: _text.f1(_words_zh(found), _words_zh(answer)), prediction, query)


@metric("longbench/rouge", title="ROUGE-L of the package rouge (LongBench's summaries)")
def rouge(prediction: str, query: Query) -> float:
    """Counts distinct words and splits at periods: not the ROUGE-L of rouge_score, so never mix the two."""
    return _best(_rouge_l, prediction, query)


@metric("longbench/rouge_zh", title="ROUGE-L over jieba's words (LongBench's Chinese summaries)")
def rouge_zh(prediction: str, query: Query) -> float:
    def score(found: str, answer: str) -> float:
        return _rouge_l(" ".join(_cut_words()(found)), " ".join(_cut_words()(answer)))

    return _best(score, prediction, query)


@metric("longbench/classification", title="1 / number of class names predicted, if the right one is among them")
def classification(prediction: str, query: Query) -> float:
    """Class names in `query.info["classes"]`. Names that the right one contains do not count.

    They are taken out while the list is walked, as officially: one right behind another that was taken out stays.
    """

    def score(found: str, answer: str) -> float:
        named = [name for name in _text.info(query, "classes") if name in found]
        at = 0
        while at < len(named):
            if named[at] in answer and named[at] != answer:
                named.remove(named[at])
            at += 1
        return 1 / len(named) if answer in named else 0.0

    return _best(score, prediction, query)


@metric("longbench/count", title="share of the predicted numbers that are right (LongBench's passage_count)")
def count(prediction: str, query: Query) -> float:
    return _best(_share_of_numbers, prediction, query)


@metric("longbench/retrieval", title="share of the predicted numbers that are the paragraph's")
def retrieval(prediction: str, query: Query) -> float:
    number = _numbered(query, r"Paragraph (\d+)")
    return _best(lambda found, _: _share_of_numbers(found, number), prediction, query)


@metric("longbench/retrieval_zh", title="share of the predicted numbers that are the paragraph's (Chinese)")
def retrieval_zh(prediction: str, query: Query) -> float:
    number = _numbered(query, r"段落(\d+)")
    return _best(lambda found, _: _share_of_numbers(found, number), prediction, query)


@metric("longbench/code", title="edit similarity of the first line of code (lcc, repobench-p)")
def code(prediction: str, query: Query) -> float:
    """1 - indel distance / total length in whole percent, of the first line without "`", "#" and "//".

    The official script gives this where `python-Levenshtein` stands beside fuzzywuzzy. Its requirements do not name
    it: without it fuzzywuzzy falls back to difflib's ratio, which is lower for some pairs.
    """
    ratio = _text.library("rapidfuzz.fuzz").ratio
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return _best(lambda _, answer: round(ratio(line, answer)) / 100, prediction, query)


@metric("longbench2/choice", title="accuracy of the letter in the fixed answer sentence (LongBench v2)")
def choice(prediction: str, query: Query) -> float:
    """The letter behind "The correct answer is", in parentheses if any is; without one the answer is wrong."""
    text = prediction.strip().replace("*", "")
    sentence = "The correct answer is "
    found = re.search(rf"{sentence}\(([A-D])\)", text) or re.search(rf"{sentence}([A-D])", text)
    return float(found is not None and found[1] == _text.gold(query))
