"""The scores of InfiniteBench (arXiv:2402.13718). Answers are strings, numbers included ("12", "3.5")."""

import re

from kvfold.evaluation.examples import Query
from kvfold.evaluation.metrics import _text
from kvfold.evaluation.metrics.base import metric

_WORD_MARKS = "\n:\"'.,?!{}"


def _whole_number(query: Query, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"query.answers={query.answers!r} must be whole numbers for metric {query.metric}") from None


@metric("infinitebench/first_int", title="whether the first run of digits is the answer (passkey, number_string)")
@metric("scbench/passkey", title="whether the first run of digits is the answer (SCBench)")
def first_int(prediction: str, query: Query) -> float:
    return float(_text.first_digits(prediction) == _text.gold(query))


@metric("infinitebench/kv", title="whether the answer is one of the prediction's words")
def kv(prediction: str, query: Query) -> float:
    return float(_text.gold(query) in _text.blank(prediction, _WORD_MARKS).split())


@metric("infinitebench/dialogue", title="whether the name is one of the prediction's words in capitals")
def dialogue(prediction: str, query: Query) -> float:
    """The answer, a name in capitals, is compared as it stands."""
    words = _text.blank(prediction, _WORD_MARKS).split()
    return float(_text.gold(query) in [word.upper() for word in words])


@metric("infinitebench/math_find", title="whether the first number is the answer")
@metric("scbench/math_find", title="whether the first number is the answer (SCBench)")
def math_find(prediction: str, query: Query) -> float:
    """Differs from InfiniteBench's script as SCBench's does: a decimal prediction loses its fraction, where the
    answer is whole, instead of ending the run."""
    return _text.same_number(prediction, _text.gold(query))


@metric("infinitebench/math_calc", title="length of the right prefix of the values, as a share")
def math_calc(prediction: str, query: Query) -> float:
    """One answer per value. The rule for GPT-4, whose first number is skipped, is left out."""
    _text.gold(query)
    wanted = [_whole_number(query, answer) for answer in query.answers]
    found = [int(number) for number in re.findall("[0-9]+", prediction)]
    pairs = zip(found, wanted, strict=False)
    right = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(found), len(wanted)))
    return right / len(wanted)


@metric("infinitebench/code_run", title="whether the last word is the value")
def code_run(prediction: str, query: Query) -> float:
    wanted = _whole_number(query, _text.gold(query))
    words = _text.blank(prediction, "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) == wanted)
    except ValueError:
        return 0.0


@metric("infinitebench/code_debug", title="whether the letter or the function's name is given as the answer")
def code_debug(prediction: str, query: Query) -> float:
    """Answers: the function's name, then its letter."""
    if len(query.answers) != 2:
        raise ValueError(f"query.answers={query.answers!r} must be (name, letter) for metric {query.metric}")
    name, letter = query.answers
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub("[Oo]ption", " ", _text.blank(text, "\n`'\"-*"))
    after = _behind_cue(text, ("answer is:", "is:", "answer:", "correct option is:"))
    return float(after is not None and after.startswith((letter, name)))


@metric("infinitebench/choice", title="whether the letter or text of the choice is given as the answer")
@metric("scbench/choice", title="whether the letter or text of the choice is given as the answer (SCBench)")
def choice(prediction: str, query: Query) -> float:
    """Answers: the right letter and the right text. The first character decides, where it is one of A to D, so
    "Baker" counts as B; then the whole output, then what follows a cue, then the first word that is a letter."""
    _text.gold(query)
    text = prediction.strip()
    if text[:1] and text[0] in "ABCD":
        return float(text[0] in query.answers)
    if text in query.answers:
        return 1.0
    text = _text.blank(text, "\n\"'.,?!{}")
    after = _behind_cue(text, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(query.answers))
    letter = next((word for word in text.split() if word in "ABCD"), None)
    return float(letter in query.answers)


def _behind_cue(text: str, cues: tuple[str, ...]) -> str | None:
    """What stands one character behind the first of the cues that occurs; None without any."""
    text = re.sub(" {2,}", " ", text)
    cue = next((cue for cue in cues if cue in text), None)
    return None if cue is None else text[text.index(cue) + len(cue) + 1 :]


@metric("infinitebench/qa", title="token F1, the best over the answers")
def qa(prediction: str, query: Query) -> float:
    return _text.best(_text.word_f1, prediction, query)


@metric("infinitebench/qa_zh", title="character F1, the best over the answers")
@metric("scbench/qa_zh", title="character F1, the best over the answers (SCBench)")
def qa_zh(prediction: str, query: Query) -> float:
    return _text.best(_text.character_f1, prediction, query)


@metric("infinitebench/summary", title="ROUGE-Lsum (rouge_score, no stemmer)")
@metric("scbench/summary", title="ROUGE-Lsum (rouge_score, no stemmer; SCBench)")
def summary(prediction: str, query: Query) -> float:
    return _text.rouge_f(prediction, query, "rougeLsum")
