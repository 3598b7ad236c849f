"""The report of a sweep that really ran, on a tiny model."""

import json
from pathlib import Path

import pytest

from kvfold.evaluation.records import read_lines
from kvfold.evaluation.report import SweepReport, make_report
from kvfold.evaluation.runner import run_sweep
from kvfold.evaluation.sweep import check_sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep") / "run"
    definition = {
        "name": "report", "models": [str(tiny)], "methods": ["snapkv", "streamingllm"], "budgets": [0.5, 60],
        "tasks": ["agreement(forced=8)", {"task": "kv_retrieval", "protocols": ["agnostic"], "lengths": [700]}],
        "lengths": [300], "samples": 2, "batch": 2,
    }  # fmt: skip
    progress = run_sweep(check_sweep(definition), folder)
    assert progress.failed == 0
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> SweepReport:
    return make_report([folder])


def test_a_sweeps_numbers_come_through(folder: Path, report: SweepReport):
    lines = list(read_lines(folder / "results.jsonl"))
    assert len(report.results.records) == len(lines)
    full = [c for c in report.cells if c.contender.reference and c.unit == "KL"]
    assert full and all(c.score == pytest.approx(0.0, abs=1e-5) and c.ratio == 1.0 for c in full)
    lossy = [c for c in report.cells if not c.contender.reference and c.unit == "KL"]
    assert all(c.score is not None and c.score > 0 and c.ratio is not None and c.ratio < 1 for c in lossy)


def test_a_sweeps_page_and_tables_can_be_made(report: SweepReport):
    text = report.html()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len(data["rows"]) == len(report.results.records) and data["heat"]
    assert "protocol: agnostic" in report.markdown()
