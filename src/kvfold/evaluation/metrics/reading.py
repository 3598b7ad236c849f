"""Scores of two reading and reasoning tests: Lost in the Middle (arXiv:2307.03172) and GSM8K (arXiv:2110.14168)."""

import re

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import Scores, metric


@metric("lostmiddle/best_subspan_em", title="whether the first line contains any answer (Lost in the Middle)")
def best_subspan_em(prediction: str, query: Query) -> float:
    """In SQuAD's normal form. Only up to the first newline, else copying the documents would win."""
    found = _text.normalize(prediction.split("\n")[0])
    return _text.best(lambda _, answer: float(_text.normalize(answer) in found), prediction, query)


def _plain_number(text: str) -> str:
    """Without commas and dollar signs, without what stands before "#### ", without a final period."""
    text = re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text))
    return re.sub(r"\.$", "", text).lower()


@metric("gsm8k/answer", title="whether the last number is the answer (lm-evaluation-harness, flexible-extract)")
def answer(prediction: str, query: Query) -> Scores:
    """`score`: lm-evaluation-harness' flexible-extract, the last number. `strict`: its strict-match, the first number
    behind "#### ". Answers may be whole solutions that end in "#### 18", or the number alone."""
    wanted = _plain_number(_text.gold(query))
    strict = re.findall(r"#### (-?[0-9.,]+)", prediction)
    flexible = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", prediction)
    return {
        "score": float(bool(flexible) and _plain_number(flexible[-1]) == wanted),
        "strict": float(bool(strict) and _plain_number(strict[0]) == wanted),
    }
