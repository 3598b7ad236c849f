"""Prompts that show their context twice (JRT-Prompt, arXiv:2407.05483), and documents cut around their answer."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvfold.evaluation.examples import Example

ARMS = {"CQ": (1, False), "QCQ": (1, True), "CCQ": (2, False), "QCCQ": (2, True)}
"""Copies of the context, and whether the question stands in front, too: what tells a cue from a repetition.

The paper reports CQ and QCCQ; the two between are ours.
"""
CONTEXT_LENGTH, ANSWER_LENGTH, MAX_NEW_TOKENS = 1000, 50, 48
"""Tokens of a document and its answer, tokens held back for the answer, tokens that are generated."""


def context_of(text: str, question: str = "") -> str:
    """A document without a question at its end, and with a full stop there."""
    text = text.strip()
    if question.strip():
        text = text.removesuffix(question.strip()).rstrip()
    return text if text.endswith(".") else f"{text}."


def prompt_of(context: str, question: str, cue: str = "", copies: int = 2) -> str:
    """`cue`, then the context `copies` times in lines of their own, the question behind the last of them.

    One copy without a cue is the ordinary prompt.
    """
    if copies < 1:
        raise ValueError(f"copies={copies} must be at least 1")
    whole = "\n".join([context_of(context, question)] * copies)
    return f"{cue} {whole} {question}" if cue else f"{whole} {question}"


def attribute_prompt(context: str, attribute: str, copies: int = 2) -> str:
    """FDA and SWDE: the value of an attribute. More than one copy has a cue in front."""
    name = attribute[:1].upper() + attribute[1:]
    return prompt_of(context, f"{name}:", f"Information about {name}." if copies > 1 else "", copies)


def completion_prompt(context: str, start: str, question: str, copies: int = 2) -> str:
    """SQuAD, NQ, TriviaQA and Drop: a sentence to complete; with more than one copy its question stands in front."""
    return prompt_of(context, start, question if copies > 1 else "", copies)


def read_twice(example: Example, arm: str = "QCCQ") -> Example:
    """An example in one of the `ARMS`: for any task, its first question as the cue.

    Raises ValueError for a cue where there are several questions, which would all see the first.
    """
    if arm not in ARMS:
        raise ValueError(f"arm={arm!r} must be one of {', '.join(ARMS)}")
    copies, cue = ARMS[arm]
    if cue and len(example.queries) > 1:
        raise ValueError(f"arm={arm!r} puts the question in front; example {example.id!r} has {len(example.queries)}")
    whole = "\n".join([example.context] * copies)
    front = f"{example.queries[0].text.strip()}\n" if cue else ""
    return replace(example, context=front + whole, info={**example.info, "arm": arm})


def cut_around(
    tokenizer: Any, document: str, answers: Sequence[str], limit: int = CONTEXT_LENGTH - ANSWER_LENGTH
) -> str | None:
    """`limit` tokens of a document around the first place of an answer, as text; half of them before it at most.

    None for an answer of one character or less. A document without the answer is cut around its end.
    """
    if any(len(answer) <= 1 for answer in answers) or not answers:
        return None
    document = document.strip()
    found = [match.start() for answer in answers if (match := re.search(re.escape(answer), document, re.IGNORECASE))]
    ids = list(tokenizer(document, add_special_tokens=False).input_ids)
    before = document[: min(found)] if found else document[:-1]
    start, stop = window_of(len(list(tokenizer(before, add_special_tokens=False).input_ids)), len(ids), limit)
    cut: str = tokenizer.decode(ids[start:stop], skip_special_tokens=True)
    return cut


def window_of(at: int, length: int, limit: int) -> tuple[int, int]:
    """From where to where `limit` of `length` tokens stand around token `at`; fewer at the end."""
    start = max(0, at - limit // 2)
    return start, min(length, at + limit - (at - start))
