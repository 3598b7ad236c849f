"""benchmarks/python_calls.py: what it prints, and that a step makes no more calls than were agreed on."""

import json
import re
import runpy
from pathlib import Path

import pytest

import kvfold
from kvfold.ops.cpu import library

SCRIPT = Path(__file__).parents[2] / "benchmarks/python_calls.py"
NAMES = runpy.run_path(str(SCRIPT))


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["python_calls.py", *words])
    NAMES["main"]()
    return capsys.readouterr().out


def test_only_the_packages_own_calls_count() -> None:
    with NAMES["Calls"]() as calls:
        json.dumps({})
        re.escape("x")
    assert calls.count == 0
    with NAMES["Calls"]() as calls:
        kvfold.parse("full")
    first = calls.count
    assert first > 0
    kvfold.parse("full")
    assert calls.count == first  # nothing counts behind the block


@pytest.mark.slow
def test_a_row_for_each_method(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--methods", "full,h2o(budget=8)", "--prompt", "20", "--warm", "2", "--steps", "3")
    got = json.loads(run(monkeypatch, capsys, *words, "--json"))
    assert got["layers"] == [4, 8] and got["prompt"] == 20
    assert [row["method"] for row in got["rows"]] == ["full", "h2o(budget=8)"]
    for row in got["rows"]:
        assert 0 < row["few"] < row["more"] and row["per_layer"] == (row["more"] - row["few"]) / 4
    table = run(monkeypatch, capsys, *words).splitlines()
    assert len(table) == 4 and table[3].startswith("| `h2o(budget=8)` |")


@pytest.mark.slow
@pytest.mark.skipif(library() is None, reason="torch does the kernels' work, in more calls")
@pytest.mark.parametrize("method,most", [("full", 40), ("h2o", 110)])
def test_a_step_makes_no_more_calls_than_agreed(
    method: str, most: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [row] = json.loads(run(monkeypatch, capsys, "--methods", method, "--json"))["rows"]
    assert row["per_layer"] <= most
