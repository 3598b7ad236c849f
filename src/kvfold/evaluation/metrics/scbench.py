"""The scores of SCBench (arXiv:2412.10319) that are not InfiniteBench's; those stand in `infinitebench`."""

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _functions, _text
from kvfold.evaluation.metrics.base import metric


@metric("scbench/contains", title="whether the prediction contains the answer (kv, prefix_suffix)")
def contains(prediction: str, query: Query) -> float:
    """Case-sensitive, glued letters allowed: InfiniteBench wants a whole word for the same task."""
    return float(_text.gold(query) in prediction)


@metric("scbench/variables", title="share of the variables named, to two digits (vt)")
def variables(prediction: str, query: Query) -> float:
    _text.gold(query)
    found = prediction.lower()
    return round(sum(name.lower() in found for name in query.answers) / len(query.answers), 2)


@metric("scbench/qa", title="whether the prediction contains any answer, in any case (qa_eng, many_shot)")
def qa(prediction: str, query: Query) -> float:
    _text.gold(query)
    found = prediction.strip().upper()
    return float(any(answer.upper() in found for answer in query.answers))


@metric("scbench/repoqa", title="whether the function written is the one asked for, by BLEU >= 0.8")
def repoqa(prediction: str, query: Query) -> float:
    """`query.info`: "needles", the repository's functions as {name: text}; "name", the one asked for; "lang".

    The most similar needle must be the one asked for, the first of equals. Comments count, as in the official run.
    """
    needles, lang = _text.info(query, "needles"), _text.info(query, "lang")
    written = _functions.first_function(prediction, lang)
    scores = {name: _functions.similarity(written, text) for name, text in needles.items()}
    name = max(scores, key=scores.__getitem__)
    return float(name == _text.info(query, "name") and scores[name] >= 0.8)
