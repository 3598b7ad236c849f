"""benchmarks/generation.py: what it runs, what it goes on with, and over which documents its table is."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import kvfold
from kvfold.testing import VOCAB
from models import build

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The scripts find each other, as they do when one is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: runpy.run_path(str(BENCHMARKS / f"{name}.py"))
    for name in ("long_runs", "agreement"):
        sys.modules.pop(name, None)


@pytest.fixture
def script(scripts):
    return scripts("generation")


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Run over so many documents by these words; results.jsonl, and the table."""
    model, docs = build("llama"), [(f"d{i}", row) for i, row in enumerate(torch.randint(3, VOCAB, (3, 40)))]

    def made(words, count=3):
        words = f"--data none --out {tmp_path / 'out'} --batch 2 {words}"
        monkeypatch.setattr("sys.argv", ["generation.py", *words.split()])
        for name, found in (("load", (model, None)), ("long_documents", docs[:count])):
            monkeypatch.setitem(script["main"].__globals__, name, lambda *_, found=found: found)
        script["main"]()
        out = tmp_path / "out"
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        return lines, (out / "table.md").read_text(), json.loads((out / "summary.json").read_text())

    made.docs, made.model = docs, model
    return made


SHORT = "--context 10 --tokens 30 --last 12"


def test_full_has_no_kl_and_others_do(run, capsys):
    lines, table, summary = run(f"--methods full;h2o;streamingllm --budgets 8 {SHORT} --against h2o")
    assert len(lines) == 9 and [line["rows"] for line in lines[:3]] == [2, 2, 1]
    assert summary["full@None"]["kl"] < 1e-6 and summary["full@None"]["top1"] == 1.0
    for name in ("h2o@8", "streamingllm@8"):
        assert summary[name]["kl"] > 1e-3 and summary[name]["most_tokens"] == 8 and summary[name]["documents"] == 3
        assert summary[name]["kl_low"] <= summary[name]["kl"] <= summary[name]["kl_high"]
    assert summary["h2o@8"]["share"] == 1.0 == summary["h2o@8"]["share_low"]
    assert table in capsys.readouterr().out and table.count("\n") == 5 and "| 8 | `h2o` | 3 |" in table
    assert "share" not in summary["full@None"]  # h2o has no run at full's budget


def test_what_is_there_is_not_run_again(run):
    first, _, _ = run(f"--methods h2o --budgets 8 {SHORT}", count=2)
    lines, _, summary = run(f"--methods h2o;tova --budgets 8 {SHORT}", count=3)
    assert lines[:2] == first and [line["doc"] for line in lines] == ["d0", "d1", "d2", "d0", "d1", "d2"]
    assert summary["h2o@8"]["documents"] == summary["tova@8"]["documents"] == 3
    again, _, summary = run(f"--methods h2o;tova --budgets 8 {SHORT} --again tova", count=1)
    assert len(again) == 7 and again[6]["method"] == "tova" and summary["h2o@8"]["documents"] == 1
    commands = json.loads((Path(sys.argv[4]) / "run.json").read_text())["commands"]
    assert len(commands) == 3 and commands[-1].endswith("--again tova")


def test_a_killed_run_goes_on(run, tmp_path):
    first, _, _ = run(f"--methods h2o --budgets 8 {SHORT}", count=2)
    with (tmp_path / "out" / "results.jsonl").open("a") as file:
        file.write('{"contender": "h2o@8", "doc": "d2", "kl"')
    lines, _, _ = run(f"--methods h2o --budgets 8 {SHORT}", count=3)
    assert lines[:2] == first and len(lines) == 3


def test_another_window_needs_another_folder(run):
    run(f"--methods h2o --budgets 8 {SHORT}", count=1)
    with pytest.raises(SystemExit, match="holds results of another last; name another folder"):
        run("--methods h2o --budgets 8 --context 10 --tokens 30 --last 11", count=1)


def test_states_on_disk_are_used(run, script, tmp_path):
    run(f"--methods h2o --budgets 8 {SHORT}", count=1)
    ids = run.docs[0][1]
    states = script["states_of"](None, ids, 12, tmp_path / "out" / "states")  # without a model
    assert states.shape == (12, 64)
    assert len(list((tmp_path / "out" / "states").iterdir())) == 1
    script["states_of"](run.model, ids, 11, tmp_path / "out" / "states")  # another window is another file
    assert len(list((tmp_path / "out" / "states").iterdir())) == 2


def test_contenders_of_a_text(scripts):
    made = scripts("long_runs")["contenders"]
    found = made('h2o; adakv(score="snapkv(window=8, kernel=3)"), full;snapkv(budget=0.5) | kivi(bits=2)', [16, 0.5])
    wrapped, composed = 'adakv(score="snapkv(window=8, kernel=3)")', "snapkv(budget=0.5) | kivi(bits=2)"
    assert [(one.name, one.budget) for one in found] == [
        ("full", None), ("h2o", 16), (wrapped, 16), ("h2o", 0.5), (wrapped, 0.5), (composed, 0.5),
    ]  # fmt: skip
    assert found[1].method == kvfold.parse("h2o(budget=16)") and found[1].key == "h2o@16"
    with pytest.raises(ValueError, match="nonsense"):
        made("nonsense", [16])
