"""RULER: the card's oracles, and solvers written from what each task asks."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark_files import benchmark_file
from kvfold.evaluation.tasks import Setting, make_examples
from kvfold.evaluation.tasks._words import wonderwords
from kvfold.evaluation.tasks.ruler_fwe import counts
from kvfold.evaluation.tasks.ruler_niah import DEPTHS

NEEDLE = re.compile(r"One of the special magic (numbers|words|uuids) for (\S+) is: (\S+)\.")
NIAH = {
    "single_1": (1, 1), "single_2": (1, 1), "single_3": (1, 1), "multikey_1": (4, 1), "multikey_2": (None, 1),
    "multikey_3": (None, 1), "multivalue": (4, 4), "multiquery": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize(("name", "wanted"), NIAH.items())
def test_needles_are_found_by_reading_all_of_them(tokenizer: Any, name: str, wanted: tuple[int | None, int]) -> None:
    for example in make_examples(f"ruler/niah_{name}", Setting(tokenizer, 9000, 4)):
        (query,) = example.queries
        needles = NEEDLE.findall(example.context)
        keys = re.split(r", and |, ", re.search(r" for (.+) mentioned", query.text)[1])  # type: ignore[index]
        assert Counter(v for _, key, v in needles if key in keys) == Counter(query.answers)
        assert len(query.answers) == wanted[1]
        assert wanted[0] in (None, len(needles))
        assert example.context.count(keys[0]) == len(query.answers) // len(keys)
        assert (query.max_new_tokens, query.metric) == (128, "contains_all")


@pytest.mark.parametrize("name", NIAH)
def test_needles_stand_anywhere(tokenizer: Any, name: str) -> None:
    depths = [example.info["depth"] for example in make_examples(f"ruler/niah_{name}", Setting(tokenizer, 9000, 30))]
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_depths_are_those_of_ruler() -> None:
    """scripts/data/synthetic/niah.py: `np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int)`, per cent."""
    assert [round(100 * depth) for depth in DEPTHS] == np.round(np.linspace(0, 100, 40)).astype(int).tolist()


def test_niah_prompts_are_those_of_ruler(tokenizer: Any) -> None:
    one = make_examples("ruler/niah_single_1", Setting(tokenizer, 4000, 1))[0]
    key = re.search(r"number for (\S+) mentioned", one.queries[0].text)[1]  # type: ignore[index]
    assert one.context.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\nThe grass is green."
    )
    assert one.queries[0].text == f"\nWhat is the special magic number for {key} mentioned in the provided text?"
    assert one.queries[0].prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert f"\nOne of the special magic numbers for {key} is: {one.queries[0].answers[0]}.\n" in one.context
    four = make_examples("ruler/niah_multiquery", Setting(tokenizer, 4000, 1))[0]
    assert four.context.startswith("Some special magic numbers are hidden within the following text. ")
    assert re.fullmatch(
        r"\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+ mentioned in the provided text\?",
        four.queries[0].text,
    )


def test_multikey_3_is_needles_throughout(tokenizer: Any) -> None:
    for example in make_examples("ruler/niah_multikey_3", Setting(tokenizer, 9000, 3)):
        lines = example.context.split("\n")[1:]
        assert len(lines) > 50 and all(NEEDLE.fullmatch(line) for line in lines)
        assert len({NEEDLE.fullmatch(line)[2] for line in lines}) == len(lines)  # type: ignore[index]


def follow(text: str, value: str) -> list[str]:
    """The names that have a value, by executing the assignments from the top."""
    held: dict[str, str] = {}
    for name, assigned in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\S+) ?$", text, re.MULTILINE):
        held[name] = held.get(assigned, assigned)
    return [name for name, has in held.items() if has == value]


@pytest.mark.parametrize(("options", "chains", "hops"), [("", 1, 4), ("(chains=3, hops=2)", 3, 2)])
def test_variables_are_found_by_executing_the_lines(tokenizer: Any, options: str, chains: int, hops: int) -> None:
    for example in make_examples(f"ruler/vt{options}", Setting(tokenizer, 9000, 4)):
        (query,) = example.queries
        shown, asked = example.context.split("Memorize and track")[1:]
        value = re.search(r"value (\d+) in the text above\.", query.text)[1]  # type: ignore[index]
        assert follow(asked, value) == list(query.answers)
        assert len(query.answers) == hops + 1 and asked.count("VAR ") == chains * (2 * hops + 1)
        assert sum(value in line for line in asked.split("\n")) == 1 and value not in shown
        told, answer = re.search(r"value (\d+), they are:  ([A-Z ]+)\n\n", shown).groups()  # type: ignore[union-attr]
        assert follow(shown, told) == answer.split()
        assert query.prefix == (
            f" Answer: According to the chain(s) of variable assignment in the text above, {hops + 1} variables are "
            f"assigned the value {value}, they are: "
        )


def listed(text: str) -> list[str]:
    return re.split(r"(?:^|\s)\d+\. ", text.split("most often.\n")[-1].split("\nQuestion")[0])[1:]


@pytest.mark.parametrize(("length", "often", "rarely"), [(12_000, 30, 3), (4000, 6, 1)])
def test_common_words_are_found_by_counting(tokenizer: Any, length: int, often: int, rarely: int) -> None:
    for example in make_examples("ruler/cwe", Setting(tokenizer, length, 3)):
        found = Counter(listed(example.context))
        assert {word for word, n in found.items() if n == often} == set(example.queries[0].answers)
        assert set(found.values()) == {often, rarely} and len(example.queries[0].answers) == 10
        shown, answer = example.context.split("most often.\n")[1].split(" Answer: ")
        example_words = Counter(listed("most often.\n" + shown)).most_common(10)
        named = re.split(r"(?:^|\s)\d+\. ", answer.split("list are:")[1].split("\nBelow")[0].strip())[1:]
        assert {word for word, _ in example_words} == set(named)


def test_frequent_words_are_found_by_counting(tokenizer: Any) -> None:
    assert counts(1000, 5) == [607, 151, 67, 37, 24]  # the card's
    for example in make_examples("ruler/fwe", Setting(tokenizer, 8000, 4)):
        text = example.context.removeprefix(
            "Read the following coded text and track the frequency of each coded word. "
            "Find the three most frequently appeared coded words. "
        )
        (dots, _), *ranked = Counter(text.split(" ")).most_common(5)
        assert dots == "..." and tuple(word for word, _ in ranked[:3]) == example.queries[0].answers
        assert ranked[2][1] > ranked[3][1]


@pytest.mark.parametrize("length", range(400, 1400, 90))
def test_frequent_words_are_unambiguous_at_short_lengths(tokenizer: Any, length: int) -> None:
    if length < 850:
        with pytest.raises(ValueError, match="too short"):
            make_examples("ruler/fwe", Setting(tokenizer, 400, 1))
        return
    example = make_examples("ruler/fwe", Setting(tokenizer, length, 1))[0]
    ranked = Counter(example.context.split("words. ")[1].split(" ")).most_common(5)
    assert [word for word, _ in ranked[1:4]] == list(example.queries[0].answers) and ranked[3][1] > ranked[4][1]


def test_hotpot_keeps_its_ten_paragraphs(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Who is number {i}?",
            "answer": f"person {i}",
            "context": [
                [f"T{i}.{j}", [f"Sentence {i}.{j}. ", f"It was person {i}." if j == 3 else "No."]] for j in range(10)
            ],
        }
        for i in range(8)
    ]
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))
    setting = Setting(tokenizer, 2500, 20, data=tmp_path)
    examples = make_examples("ruler/qa_2", setting)
    assert len(examples) == 8  # as many as there are questions
    for i, example in enumerate(examples):
        documents = re.findall(r"Document \d+:\nT(\d)\.(\d)\nSentence \d\.\d\. (.*)", example.context)
        assert sum(owner == str(i) for owner, _, _ in documents) == 10 < len(documents)
        assert example.queries[0].answers == (f"person {i}",)
        assert example.queries[0].text.endswith(f"\n\nQuestion: Who is number {i}?")
        assert example.context.count(f"person {i}.") == 1


def test_qa_of_real_questions(tokenizer: Any) -> None:
    setting = Setting(tokenizer, 9000, 5, data=benchmark_file("nq-open-oracle.jsonl"))
    for example in make_examples("ruler/qa_1", setting):
        query = example.queries[0]
        assert any(answer.lower() in example.context.lower() for answer in query.answers)
        assert len(set(re.findall(r"Document \d+:\n(.*)", example.context))) > 5
        assert (query.metric, query.prefix, query.max_new_tokens) == ("contains_any", " Answer:", 32)


def test_qa_says_what_data_it_needs(tokenizer: Any, tmp_path: Path) -> None:
    for data in (None, tmp_path):
        with pytest.raises(ValueError, match=r"task ruler/qa_1 needs a file, or a folder with one of \*squad\*\.json"):
            make_examples("ruler/qa_1", Setting(tokenizer, 9000, 1, data=data))
    (tmp_path / "squad.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="is no file of SQuAD, HotpotQA or nq-open: KeyError"):
        make_examples("ruler/qa_1", Setting(tokenizer, 9000, 1, data=tmp_path))


def test_words_say_which_package_they_are_of(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wonderwords.cache_clear()
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.setitem(sys.modules, "wonderwords.assets", None)
    with pytest.raises(RuntimeError, match="pip install wonderwords"):
        make_examples("ruler/niah_single_1", Setting(tokenizer, 4000, 1))
    assert make_examples("ruler/niah_multikey_3", Setting(tokenizer, 4000, 1))  # uuids need no words
