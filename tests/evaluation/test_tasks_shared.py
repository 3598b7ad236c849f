"""Tasks that ask several things about one context: solvers written from what each task asks."""

import json
import re
from typing import Any

import pytest

from kvfold.evaluation.metrics import get_metric
from kvfold.evaluation.tasks import Setting, make_examples


def test_kv_turns_ask_for_pairs_from_all_over(tokenizer: Any) -> None:
    for example in make_examples("scbench/kv(turns=4)", Setting(tokenizer, 9000, 3)):
        rows = json.loads(example.context.split("JSON data:\n")[1])
        keys = [re.search(r'Key: "(.+)"', query.text)[1] for query in example.queries]  # type: ignore[index]
        assert [(rows[key],) for key in keys] == [query.answers for query in example.queries]
        quarters = sorted(list(rows).index(key) * 4 // len(rows) for key in keys)
        assert quarters == pytest.approx([0, 1, 2, 3], abs=1) and len(set(keys)) == 4
        for query in example.queries:  # the card's: case counts
            score = get_metric(query.metric)
            assert score(f"x {query.answers[0]} y", query)["score"] == 1.0
            assert score(f"x {query.answers[0].upper()} y", query)["score"] == 0.0


def test_one_string_has_the_asked_ends(tokenizer: Any) -> None:
    for example in make_examples("scbench/prefix_suffix", Setting(tokenizer, 9000, 3)):
        strings = example.context.split("\n\n")[1].split("\n")
        assert all(65 <= len(string) <= 122 for string in strings)
        for query in example.queries:
            first, last = re.search(r'Prefix: "(.+)"\nSuffix: "(.+)"', query.text).groups()  # type: ignore[union-attr]
            found = [string for string in strings if string.startswith(first) and string.endswith(last)]
            assert tuple(found) == query.answers


def test_every_turn_follows_its_own_chain(tokenizer: Any) -> None:
    for example in make_examples("scbench/multihop(hops=3)", Setting(tokenizer, 7000, 3)):
        held: dict[str, str] = {}
        for name, value in re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\S+) ?$", example.context, re.MULTILINE):
            held[name] = held.get(value, value)
        asked = [re.search(r"value (\d+) in", query.text)[1] for query in example.queries]  # type: ignore[index]
        assert len(set(asked)) == 5 == len(set(held.values()))
        for value, query in zip(asked, example.queries, strict=True):
            assert tuple(name for name, has in held.items() if has == value) == query.answers
            assert len(query.answers) == 4 and query.metric == "scbench/variables"


def test_several_questions_about_one_list(tokenizer: Any) -> None:
    for example in make_examples("scbench/math_find(turns=7)", Setting(tokenizer, 5000, 3)):
        numbers = json.loads(example.context.split("\n\n")[1])
        ranked = sorted(set(numbers))
        right = {
            "largest number": ranked[-1], "second largest number": ranked[-2], "third largest number": ranked[-3],
            "smallest number": ranked[0], "second smallest number": ranked[1], "third smallest number": ranked[2],
            "median number": sorted(numbers)[len(numbers) // 2],
        }  # fmt: skip
        found = {re.search("What is the (.+)\\?", q.text)[1]: int(q.answers[0]) for q in example.queries}  # type: ignore[index]
        assert found == right and len(numbers) % 2 == 1 and all(100 <= number <= 999 for number in numbers)


SAID = re.compile(r'^(\w+) said, "(.*)"$', re.MULTILINE)
READ = {
    r"What is the name of (\w+)'s (\w+)\?": r"I adopted a {1} and named it (\w+)\.",
    r"Which two cities did (\w+) travel to\?": r"(?:weekend in|holiday in) (\w+)",
    r"In which city does (\w+) live now\?": r"I now live in (\w+),",
    r"What does (\w+) learn in the evenings\?": r"in the evenings I learn (\w+)\.",
    r"When did (\w+) (?:run|get|sell|give) the (.+)\?": r"my {1} (today)!",
}


def read(context: str, question: str) -> str:
    """What a person said, or when, looked up in the dialogue."""
    for pattern, told in READ.items():
        if asked := re.fullmatch(pattern, question):
            found = []
            for session in context.split("\nDATE: ")[1:]:
                for who, text in SAID.findall(session):
                    if who == asked[1] and (heard := re.search(told.format(*asked.groups()), text)):
                        found.append(session.split("\n")[0] if heard[1] == "today" else heard[1])
            return ", ".join(found) or "not mentioned"
    return "not mentioned"


def test_conversations_are_answered_by_looking_facts_up(tokenizer: Any) -> None:
    seen = set()
    for example in make_examples("conversation(queries=12)", Setting(tokenizer, 9000)):
        assert example.context.count("\nDATE: ") == example.context.count("\nCONVERSATION:\n") == 5
        for query in example.queries:
            question = re.search("Question: (.+)\n", query.text)[1]  # type: ignore[index]
            assert read(example.context, question) == query.answers[0]
            seen.add((query.info["category"], query.info["kind"]))
            if query.info["kind"] in ("two", "update"):
                assert len(set(query.info["sessions"])) == 2
            assert get_metric("convqa/locomo")(query.answers[0], query)["score"] == 1.0
    assert seen == {(4, "one"), (1, "two"), (2, "date"), (4, "update"), (5, "never")}


def test_categories_take_turns(tokenizer: Any) -> None:
    (example,) = make_examples("conversation(sessions=3, queries=6)", Setting(tokenizer, 6000, 1))
    assert [query.info["category"] for query in example.queries] == [4, 1, 2, 4, 5, 4]
    dates = re.findall(r"^DATE: \d+ (\w+) (\d+)$", example.context, re.MULTILINE)
    assert len(dates) == 3
