"""Needles, look-ups and keys: solvers written from what each task asks, and the cards' oracles."""

import json
import re
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.tasks import Setting, make_examples
from kvfold.evaluation.tasks.niah_sentence import BEFORE, NEEDLE, insert

HIDDEN = re.compile(r"The special magic (number|word|uuid) for (\w+) is (\S+)\.")


@pytest.mark.parametrize(
    ("options", "needles", "answers"),
    [
        ("", 1, 1),
        ("(keys=6)", 6, 1),
        ("(values=3, kind='words')", 3, 3),
        ("(keys=5, values=2, queries=2, kind='uuids')", 10, 4),
    ],
)
def test_niah_is_solved_by_reading_all_needles(tokenizer: Any, options: str, needles: int, answers: int) -> None:
    for example in make_examples(f"niah{options}", Setting(tokenizer, 6000, 5)):
        (query,) = example.queries
        found = HIDDEN.findall(example.context)
        cities = re.search(r"for (.+)\?", query.text)[1].split(" and ")  # type: ignore[index]
        assert len(found) == needles and len(query.answers) == answers
        assert Counter(value for _, city, value in found if city in cities) == Counter(query.answers)
        verb = "is" if answers == 1 else "are"
        assert query.text == f"\n\nWhat {verb} {query.prefix[0].lower()}{query.prefix[1:].removesuffix(f' {verb}')}?\n"


def test_niah_goes_through_its_depths(tokenizer: Any) -> None:
    depths = (0.0, 0.3, 1.0)
    for i, example in enumerate(make_examples(f"niah(keys=3, depths={depths})", Setting(tokenizer, 9000, 6))):
        haystack = example.context.split("\n\n", 1)[1]
        place = haystack.index(example.queries[0].answers[0]) / len(haystack)
        assert example.info["depth"] == depths[i % 3]
        assert place == pytest.approx(depths[i % 3], abs=0.07)


def test_sentence_stands_at_the_end_of_a_sentence(tokenizer: Any) -> None:
    examples = make_examples("niah/sentence", Setting(tokenizer, 8000))
    assert [example.info["depth"] for example in examples] == [0, 0.11, 0.22, 0.33, 0.44, 0.56, 0.67, 0.78, 0.89, 1]
    for example in examples:
        book = example.context.removeprefix(BEFORE)
        before, after = book.split(f"\n{NEEDLE}\n")
        assert not before or before[-1] in ".!?\"')" or before.split()[-1].isupper() or after == ""
        assert len(before.split()) / len((before + " " + after).split()) == pytest.approx(
            example.info["depth"], abs=0.05
        )
        assert not example.chat and example.queries[0].stop
    assert examples[0].context.startswith(f"{BEFORE}\n{NEEDLE}\n") and examples[-1].context.endswith(f"\n{NEEDLE}\n")
    assert insert(["A b c.", "D e f."], 0.5) == f"A b c.\n{NEEDLE}\nD e f."
    assert insert(["A b c.", "D e f."], 0.9) == f"A b c.\n{NEEDLE}\nD e f."  # back to where the sentence began


def test_sentence_scores_recalled_words(tokenizer: Any) -> None:
    query = make_examples("niah/sentence", Setting(tokenizer, 4000, 1))[0].queries[0]
    score = get_metric("niah/recall")
    assert score("eat a sandwich and sit in Dolores Park on a sunny day.", query)["score"] == 1.0
    assert score("eat a sandwich and sit in Dolores Park on a sunny day", query)["score"] == pytest.approx(10 / 11)


@pytest.mark.parametrize("options", ["", "(pairs=20)"])
def test_kv_is_json_with_the_asked_pair_at_its_place(tokenizer: Any, options: str) -> None:
    for i, example in enumerate(make_examples(f"kv_retrieval{options}", Setting(tokenizer, 7000, 5))):
        before, text = example.context.split("JSON data:\n")
        asked = example.queries[0].text + example.queries[0].prefix
        key = re.fullmatch(r'\n\nKey: "(.+)"\nCorresponding value:', asked)[1]  # type: ignore[index]
        rows = json.loads(text)
        assert before == "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        assert (rows[key],) == example.queries[0].answers
        assert list(rows).index(key) == example.info["position"] == round((len(rows) - 1) * i / 4)
        assert len(rows) == example.info["pairs"] and len({*rows, *rows.values()}) == 2 * len(rows)
        assert text.count(",\n ") == len(rows) - 1 and (not options or len(rows) == 20)


def test_kv_of_fixed_pairs_needs_no_length(tokenizer: Any) -> None:
    assert [example.info["pairs"] for example in make_examples("kv_retrieval(pairs=75)", Setting(tokenizer))] == [
        75
    ] * 20
    with pytest.raises(ValueError, match=r"length=4000 is too short for task kv_retrieval"):
        make_examples("kv_retrieval(pairs=75)", Setting(tokenizer, 4000, 1))


@pytest.mark.parametrize("name", ["passkey", "number_string"])
def test_keys_in_noise(tokenizer: Any, name: str) -> None:
    for i, example in enumerate(make_examples(name, Setting(tokenizer, 4000, 11))):
        (key,) = example.queries[0].answers
        lines = example.context.split("\n\n", 1)[1].split("\n")
        (line,) = {*lines} - {lines[1] if lines[0] != lines[1] else lines[0]}
        assert re.findall(r"\d+", example.context) == [key, key] and key in line
        assert lines.index(line) == int((len(lines) - 1) * i / 10)
        assert len(key) == (5 if name == "passkey" else 10)
        assert len(list(groupby(key))) <= 5
        assert get_metric(example.queries[0].metric)(f" {key}.", example.queries[0])["score"] == 1.0


@pytest.mark.parametrize(("digits", "metric"), [(7, "longctx/exact"), (64, "longctx/partial")])
def test_graded_pass_key(tokenizer: Any, digits: int, metric: str) -> None:
    for i, example in enumerate(make_examples(f"longctx/passkey(digits={digits})", Setting(tokenizer, 5000, 10))):
        (key,) = example.queries[0].answers
        content = example.context.split("\n", 1)[1]
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        assert len(key) == digits and example.context.count(key) == 2 and example.queries[0].metric == metric
        words = content.split(" ")
        assert len(words) == example.info["words"] + len(needle.split(" "))
        assert " ".join(words[int(example.info["words"] * i / 9) :]).startswith(needle)
        assert not example.chat and example.queries[0].text + example.queries[0].prefix == (
            "\nWhat is the pass key? The pass key is "
        )


def test_texts_that_hold_a_needle_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"One day it rained. {NEEDLE} Then it stopped. " * 40)
    with pytest.raises(ValueError, match=r"texts=.* stands \d+ times in the haystack, not once"):
        make_examples("niah/sentence", Setting(tokenizer, 3000, 1, texts=tmp_path))
    with pytest.raises(ValueError, match="must be a text file, or a folder with"):
        make_examples("niah", Setting(tokenizer, 3000, 1, texts=tmp_path / "none"))


def test_code_run_by_executing_it(tokenizer: Any) -> None:
    for i, example in enumerate(make_examples("infinitebench/code_run_made", Setting(tokenizer, 5000, 10))):
        (query,), scope = example.queries, dict[str, Any]()
        call = re.search(r"value of (func_\d+\(-?\d+\))\.", query.text)[1]  # type: ignore[index]
        code = example.context.split("Python code.\n\n")[1]
        exec(code, scope)
        assert str(eval(call, scope)) == query.answers[0]
        numbers = [int(number) for number in re.findall(r"def func_(\d+)", code)]
        assert numbers == sorted(set(numbers)) and len(numbers) == example.info["functions"]
        depth, name = 1, call.split("(")[0]
        while further := re.search(rf"def {name}\(x\):\n    return (func_\d+)", code):
            depth, name = depth + 1, further[1]
        assert depth == (2, 4, 6, 8, 10)[i % 5]


def ask(kind: str, numbers: list[int]) -> float:
    """What is asked of a list, by hand."""
    if kind == "median number":
        ranked = sorted(numbers)
        return (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    left = set(numbers)
    best = max if "largest" in kind else min
    for _ in range({"second": 1, "third": 2}.get(kind.split()[0], 0)):
        left.remove(best(left))
    return best(left)


def test_math_find_by_sorting(tokenizer: Any) -> None:
    assert [ask(f"{rank} largest number", [5, 5, 3, 1]) for rank in ("second", "third")] == [3, 1]  # the card's
    kinds = []
    for example in make_examples("infinitebench/math_find_made", Setting(tokenizer, 3000, 7)):
        kind = re.search(r"What is the (.+) in the following list\?", example.context)[1]  # type: ignore[index]
        numbers = json.loads(example.context.split("\n\n")[1])
        assert int(example.queries[0].answers[0]) == ask(kind, numbers)
        assert (
            example.queries[0].text.endswith(f"The {kind} of the list is: ") and 0 <= min(numbers) <= max(numbers) <= 99
        )
        kinds.append(kind)
    assert len(set(kinds)) == 7
