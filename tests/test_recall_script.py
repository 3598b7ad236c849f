"""benchmarks/recall.py: what is read, fed and asked, and which answers count."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import kvfold
from models import build

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Letters:
    """A token for two characters, 3 to 96."""

    def __call__(self, text, **_):
        pairs = zip(text[::2], text[1::2] + " ", strict=False)
        ids = torch.tensor([[3 + (7 * ord(one) + ord(other)) % 94 for one, other in pairs]])
        return type("Read", (), {"input_ids": ids})

    def batch_decode(self, ids):
        return ["".join(chr(token % 94 + 33) for token in row.tolist()) for row in ids]


LENGTHS = {"prompt": 90, "before": 10, "tokens": 20}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "recall.py"))
    for name in ("long_runs", "agreement"):
        sys.modules.pop(name, None)


def made(script, count=6, **changed):
    docs = [torch.full((300,), 3 + i) for i in range(4)]
    return script["stated"](Letters(), docs, count, **{**LENGTHS, **changed})


def test_the_fact_is_in_the_prompt_and_the_question_at_the_end(script):
    facts = made(script)
    assert len({len(fact.ids) for fact in facts}) == 1 and len({fact.code for fact in facts}) == 6
    for number, fact in enumerate(facts):
        statement, question, code = script["words"](0, number)
        said, asked = (Letters()(text).input_ids[0] for text in (f"\n\n{statement}\n\n", f"\n\n{question}"))
        assert fact.code == code and code in statement and code not in question and 5 <= len(code) <= 7
        assert fact.ids[10 : 10 + len(said)].equal(said) and 10 + len(said) <= LENGTHS["prompt"]
        assert fact.ids[-len(asked) :].equal(asked) and (fact.ids[:10] == 3 + number % 4).all()
        assert statement.split(code)[0].endswith(question[-20:] + " ")  # it ends where the number would stand
        assert len(fact.ids) == 90 + 20 + script["ROOM"]


def test_facts_are_those_of_the_seed(script):
    names = {script["words"](0, number)[0] for number in range(60)}
    assert len(names) == 60 and {script["words"](0, number)[0] for number in range(60)} == names
    assert script["words"](1, 0) != script["words"](0, 0)


def test_no_room(script):
    with pytest.raises(ValueError, match=r"prompt=40 must be at least \d+: 10 tokens"):
        made(script, prompt=40)
    with pytest.raises(ValueError, match=r"docs\[0\] must have"):
        script["stated"](Letters(), [torch.full((50,), 3)], 1, **LENGTHS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" 48213.", (True, 1.0)), (" 482137", (False, 1.0)), (" 48", (False, 0.4)), (" 58213", (False, 0.0)),
        (" number 48213 of", (True, 1.0)), (" the", (False, 0.0)), (" 1, not 48213", (False, 0.0)),
    ],
)  # fmt: skip
def test_what_counts(script, answer, expected):
    assert script["right"](answer, "48213") == expected


@pytest.mark.parametrize("method", ["full", "h2o(budget=16)"])
def test_rows_answer_as_alone_and_as_without_a_cache(script, method):
    model, facts = build("llama"), made(script, 3)
    ids = torch.stack([fact.ids for fact in facts])
    said = script["answers"](model, Letters(), kvfold.Cache(model, method), ids, LENGTHS["prompt"])
    for row in range(3):
        alone = kvfold.Cache(model, method)
        assert script["answers"](model, Letters(), alone, ids[row : row + 1], LENGTHS["prompt"]) == [said[row]]
    if method == "full":
        for _ in range(script["ANSWER"]):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert said == Letters().batch_decode(ids[:, len(facts[0].ids) :])


def test_a_run_goes_on_and_full_is_the_ceiling(script, tmp_path, monkeypatch):
    docs = [("d", torch.arange(300) % 90 + 3)]
    for name, found in (("load", (build("llama"), Letters())), ("long_documents", docs)):
        monkeypatch.setitem(script["main"].__globals__, name, lambda *_, found=found: found)

    def run(count, answer):
        monkeypatch.setitem(script["main"].__globals__, "answers", answer)
        words = f"--data none --out {tmp_path} --methods full;h2o --budgets 16 --facts {count} --batch 2"
        lengths = " ".join(f"--{name} {value}" for name, value in LENGTHS.items())
        monkeypatch.setattr("sys.argv", ["recall.py", *words.split(), *lengths.split()])
        script["main"]()
        return json.loads((tmp_path / "summary.json").read_text())

    facts = script["stated"](Letters(), [docs[0][1]], 4, **LENGTHS)
    codes = [fact.code for fact in facts]

    def answer(_, __, cache, ids, ___):
        """`full` knows all but the last fact, the other one the first two; each is asked once."""
        known = codes[:3] if str(cache.method).startswith("full") else codes[:2]
        asked = [next(fact.code for fact in facts if row.equal(fact.ids)) for row in ids]
        return [f" {code}" if code in known else " 7" for code in asked]

    found = run(4, answer)
    assert found["full@None"]["found"] == 0.75 and found["h2o@16"]["found"] == 0.5
    assert found["h2o@16"]["of_full"] == pytest.approx(2 / 3) and found["full@None"]["of_full"] == 1.0

    def never(*_):
        raise AssertionError("it was measured already")

    assert run(4, never) == found
    assert "| 16 | `h2o` | 4 | 0.50 [" in (tmp_path / "table.md").read_text()
