"""The scores of L-Eval (arXiv:2307.11088) that need no judge."""

import re

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import Scores, metric
from kvfold.evaluation.metrics.zeroscrolls import KINDS, geometric_mean

LETTERS = "ABCD"


@metric("leval/exam", title="exact match by the rules of the set; a part of several right letters counts 0.25")
def exam(prediction: str, query: Query) -> float:
    """Set in `query.info["set"]`, by its file's name: coursera (letters), quality and tpo (a letter), gsm100 (a
    number), codeU (printed values); any other, topic_retrieval_longchat among them, as text. sci_fi, whose answers are
    pairs of judgements, is left out.
    """
    name, wanted = _text.info(query, "set"), _text.gold(query)
    if name == "sci_fi":
        raise ValueError(f"query.info['set']={name!r} must be another set: its pairs of judgements are not scored here")
    if name in ("coursera", "quality", "tpo"):
        found = _letters(prediction) if name == "coursera" else _letter(prediction)
        return _match(found, _only_letters(wanted.split()[0]) or "A")
    if name.startswith("gsm"):
        return _match(_number(prediction), _number(wanted))
    if name == "codeU":
        return _match(_printed(prediction, len(wanted.split()) + 3), _values(wanted))
    return _match(prediction, wanted)


def _only_letters(text: str) -> str:
    return re.sub(f"[^{LETTERS}]", "", text)


def _letter(prediction: str) -> str:
    """The first letter A to D anywhere; without one what coursera's rule makes of it."""
    if prediction and prediction in LETTERS:
        return prediction
    return _only_letters(prediction)[:1] or _letters(prediction)


def _letters(prediction: str) -> str:
    """All letters given: several at the start, else those before a blank, period or parenthesis, else the first run;
    officially "A" where there is none."""
    if not prediction.strip():
        return "None"
    if prediction in LETTERS:
        return prediction
    start = re.match(f"[{LETTERS}]*", prediction)
    leading = start[0] if start else ""
    if len(leading) > 1:
        return "".join(sorted(set(leading)))
    rest = prediction[len(leading) :].split("Question")[0]
    found = leading + _only_letters("".join(re.findall(r"[A-Z](?=[\s.)])", rest)))
    if found:
        return "".join(sorted(set(found)))
    run = re.search(f"[{LETTERS}]+", rest)
    return run[0] if run else "A"


def _number(text: str) -> str:
    """Digits before any period of the word behind "The answer is", else of the first paragraph's last word with one."""
    said = re.search(r"The answer is (\S+)", text)
    words = [said[1]] if said else [word for word in text.split("\n\n")[0].split(" ") if re.search(r"\d", word)]
    return "".join(re.findall(r"\d", words[-1].split(".")[0])) if words else ""


def _values(text: str) -> str:
    """Python's printed values in one spelling: no commas, quotes, backslashes, ".0" or blanks between brackets."""
    text = re.sub(r"[,'\\]", "", re.sub(r"\s+", " ", text)).replace(".0", "")
    for spaced in ("] [", "[ [", "] ]"):
        text = text.replace(spaced, spaced.replace(" ", ""))
    return text


def _printed(prediction: str, size: int) -> str:
    """So many words behind the last "the final output", else the last words, without phrases that lead to a value."""
    text = _values(prediction)
    for phrase in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        text = text.replace(phrase, "")
    _, cue, behind = text.rpartition("the final output")
    words = re.split(r"\s+", behind)
    return " ".join(words[:size] if cue else words[-size:])


def _match(prediction: str, answer: str) -> float:
    wanted = _text.normalize(answer, lower=False)
    if set(wanted) <= set(LETTERS):
        found = _text.normalize(prediction, lower=False)
        return 1.0 if found == wanted else 0.25 * (set(found) <= set(wanted))
    try:
        return float(float(prediction) == float(answer))
    except ValueError:
        return float(answer.lower().replace(" ", "") in prediction.lower().replace(" ", ""))


@metric("leval/f1", title="token F1 (L-Eval's QA)")
def f1(prediction: str, query: Query) -> float:
    return _text.best(_text.word_f1, prediction, query)


@metric("leval/rouge", title="geometric mean of ROUGE-1, -2 and -L (L-Eval's summaries)", aggregate=geometric_mean)
def rouge(prediction: str, query: Query) -> Scores:
    return {kind: _text.rouge_f(prediction, query, kind) for kind in KINDS}
