"""JRT-Prompt's texts against the card: the official prompts, the four arms, and the cut around an answer."""

import pytest

from kvfold.evaluation.examples import Example, Query
from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.twice import (
    ARMS,
    attribute_prompt,
    completion_prompt,
    context_of,
    cut_around,
    prompt_of,
    read_twice,
    window_of,
)


def test_oracle_attribute():
    assert attribute_prompt("A b.", "name") == "Information about Name. A b.\nA b. Name:"
    assert attribute_prompt("A b.", "name", copies=1) == "A b. Name:"


@pytest.mark.parametrize("text", ["A b", "A b.", " A b. ", "A b. Name:", "A b Name:"])
def test_oracle_one_full_stop_and_no_question(text):
    assert context_of(text, "Name:") == "A b."
    assert prompt_of(text, "Name:", copies=1) == "A b. Name:"


def test_oracle_the_context_twice_and_the_question_once(tokenizer):
    context, question, cue = "The mill stood by the river.", "The mill stood by the", "Where did the mill stand?"
    text = completion_prompt(context, question, cue)
    assert text == f"{cue} {context}\n{context} {question}"
    assert text.count(context) == 2 and text.endswith(f". {question}")
    sizes = [len(tokenizer(part).input_ids) for part in (text, context, cue, question)]
    assert sizes[0] == 2 * sizes[1] + sizes[2] + sizes[3] + 3  # two blanks and a newline, a token each
    assert completion_prompt(context, question, cue, copies=1) == f"{context} {question}"


def test_oracle_one_copy_without_a_cue_is_the_example():
    example = Example("a", "A b.", (Query("\nWho?", ("b",)),), info={"depth": 1})
    assert {arm: read_twice(example, arm).context for arm in ARMS} == {
        "CQ": "A b.", "QCQ": "Who?\nA b.", "CCQ": "A b.\nA b.", "QCCQ": "Who?\nA b.\nA b.",
    }  # fmt: skip
    assert read_twice(example, "CQ").queries == example.queries
    assert read_twice(example, "CQ").info == {"depth": 1, "arm": "CQ"}


def test_oracle_where_the_cut_is():
    assert window_of(1500, 2000, 950) == (1025, 1975)
    assert window_of(10, 2000, 950) == (0, 950)
    assert window_of(1900, 2000, 950) == (1425, 2000)
    assert window_of(3, 5, 950) == (0, 5)


def test_a_document_is_cut_around_its_first_answer(tokenizer):
    document = "x" * 1500 + "PARIS" + "y" * 400 + "Rome" + "z" * 91
    assert (
        cut_around(tokenizer, document, ["Rome", "paris"], 950) == "x" * 475 + "PARIS" + "y" * 400 + "Rome" + "z" * 66
    )
    assert cut_around(tokenizer, "Paris" + document, ["Paris"], 10) == "Paris" + "x" * 5
    assert cut_around(tokenizer, document, ["London"], 10) == "z" * 6  # one before the last: five and it
    assert cut_around(tokenizer, document, ["x"]) is None and cut_around(tokenizer, document, []) is None


def test_oracle_the_metric():
    metric = get_metric("contains_any")
    assert metric("3x5%", Query("", ("3.5%",)))["score"] == 0.0
    assert metric("paris, France", Query("", ("Lyon", "Paris")))["score"] == 1.0


def test_what_can_not_be():
    example = Example("a", "A b.", (Query("Who?"), Query("Where?")))
    assert read_twice(example, "CCQ").context == "A b.\nA b."
    with pytest.raises(ValueError, match=r"arm='QCCQ' puts the question in front; example 'a' has 2"):
        read_twice(example)
    with pytest.raises(ValueError, match="arm='CC' must be one of CQ, QCQ, CCQ, QCCQ"):
        read_twice(example, "CC")
    with pytest.raises(ValueError, match="copies=0 must be at least 1"):
        prompt_of("A b.", "Who?", copies=0)
