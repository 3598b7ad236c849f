"""`kvfold report`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from kvfold.cli.report import report_command
from report_folders import write_folder

runner = CliRunner()
app = typer.Typer()
app.command()(report_command)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "run", lengths=(256,), samples=3)


def test_tables_on_standard_output(run: Path):
    result = runner.invoke(app, [str(run)])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# Evaluation\n") and "protocol: agnostic" in result.stdout


def test_files(run: Path, tmp_path: Path):
    table, page = tmp_path / "r.md", tmp_path / "r.html"
    result = runner.invoke(app, [str(run), "--markdown", str(table), "--out", str(page)])
    assert result.exit_code == 0 and result.stdout == ""
    assert table.read_text(encoding="utf-8").startswith("# Evaluation\n")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "%%" not in text.split("<script>")[0]
    assert text.count("</script") == 3  # Vega, data, the page's own: nothing else ends a script
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.md", "run"]


def test_json(run: Path):
    found = json.loads(runner.invoke(app, [str(run), "--json"]).stdout)
    assert set(found) == {"sweeps", "rows"}
    assert {row["protocol"] for row in found["rows"]} == {"agnostic"}
    assert {
        "model",
        "dtype",
        "task",
        "length",
        "method",
        "budget",
        "score",
        "low",
        "high",
        "ratio",
        "n",
        "failed",
    } <= set(found["rows"][0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "page.pdf"], "must end in .html"),
        (["--out", "nowhere/page.html"], "there is no folder"),
        (["--markdown", "nowhere/r.md"], "there is no folder"),
    ],
)
def test_bad_paths_are_refused_before_anything_is_read(tmp_path: Path, words: list[str], message: str):
    result = runner.invoke(app, [str(tmp_path), *words])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_a_folder_without_results_is_refused(tmp_path: Path):
    result = runner.invoke(app, [str(tmp_path)])
    assert isinstance(result.exception, ValueError) and "must hold" in str(result.exception)
