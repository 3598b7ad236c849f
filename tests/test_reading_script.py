"""benchmarks/reading.py: its table is what the results say, with the needles of an evaluation beside them."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest

from kvfold.files import read_json

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
MODELS = ("smollm2-135m-instruct", "gemma3-270m")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield runpy.run_path(str(BENCHMARKS / "reading.py"))
    for name in ("long_runs", "agreement"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("model", MODELS)
def test_the_table_is_what_the_results_say(script, model, tmp_path):
    """Ten documents of each method, every number of the table from the lines beside it."""
    folder = RESULTS / "reading" / model
    shutil.copy(folder / "results.jsonl", tmp_path)
    kept = script["RunFolder"](tmp_path, {}, "document")
    docs = list(dict.fromkeys(record["document"] for record in kept.found.values()))
    names = list(dict.fromkeys(record["method"] for record in kept.found.values()))
    known = read_json(folder / "summary.json", "summary.json")
    ran = [script["Contender"](name, None, None) for name in sorted(names, key=list(known).index)]
    needles = script["needles_in"](RESULTS / "reading" / "needles", model)
    summary, table = script["report"](kept, ran, docs, needles)
    assert summary.keys() == known.keys() and {s["documents"] for s in summary.values()} == {10}
    assert table == (folder / "table.md").read_text(encoding="utf-8")
    assert summary["full"]["kl"] < 1e-6 and summary["quest(budget=0.12)"]["read"] < 0.6


def test_needles_are_those_of_the_model(script):
    for model, full in zip(MODELS, (97.5, 100.0), strict=True):
        found = script["needles_in"](RESULTS / "reading" / "needles", model)
        assert found["full"] == (full, 40) and len(found) >= 12
    with pytest.raises(ValueError, match="has no results of another with the task niah"):
        script["needles_in"](RESULTS / "reading" / "needles", "another")
