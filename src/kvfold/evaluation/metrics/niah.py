"""Scores of needles in haystacks, as KVCache-Factory and NeedleBench (arXiv:2407.11963) take them."""

import re

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import metric


@metric("niah/rouge1", title="ROUGE-1 F with stemmer against the whole needle")
def rouge1(prediction: str, query: Query) -> float:
    """Needle in `query.info["needle"]`. Ten times this is the raw score; a perfect answer has about 0.73."""
    needle = Query("", (_text.info(query, "needle"),), metric=query.metric)
    return _text.rouge_f(prediction, needle, "rouge1", stemmer=True)


@metric("niah/recall", title="share of the expected answer's distinct words in the prediction")
def recall(prediction: str, query: Query) -> float:
    """Words as blanks separate them, lower-cased, so "day." is not "day"."""
    found = set(prediction.lower().split())
    return _text.best(lambda _, answer: _shared(found, set(answer.lower().split())), prediction, query)


def _shared(found: set[str], wanted: set[str]) -> float:
    return len(found & wanted) / len(wanted) if wanted else 0.0


@metric("niah/keyword", title="1 with the keyword, else a fifth of the edit similarity to the needle")
def keyword(prediction: str, query: Query) -> float:
    """NeedleBench's single retrieval: keyword in `query.answers`, needle in `query.info["needle"]`, blanks left out."""
    if _text.gold(query) in prediction:
        return 1.0
    texts = [re.sub(r"\s+", "", text) for text in (prediction, _text.info(query, "needle"))]
    similarity = _text.library("rapidfuzz.distance").Levenshtein.normalized_similarity(*texts)
    return 0.2 * float(similarity)
