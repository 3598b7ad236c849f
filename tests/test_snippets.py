"""What README.md and docs/ show runs as it stands there: Python as pasted, commands with the flags that there are.

`make snippets` runs README.md's on an installed wheel.
"""

import os
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import kvfold
from kvfold.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
STORY = (ROOT / "examples/documents/blue-carbuncle.txt").read_text(encoding="utf-8")[:2000]


def snippets(path: Path, kind: str) -> list[str]:
    return [text for found, text in FENCE.findall(path.read_text(encoding="utf-8")) if found == kind]


def commands() -> list[str]:
    """Every line of a fence that calls kvfold, without its comment."""
    lines = [
        line.strip()
        for path in [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
        for _, text in FENCE.findall(path.read_text(encoding="utf-8"))
        for line in text.replace("\\\n", " ").splitlines()
    ]
    return sorted({line for line in lines if re.match(r"kvfold [a-z-]", line)})


@pytest.fixture(scope="module")
def load():
    """`kvfold.load`, each model once."""
    return cache(kvfold.load)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in PAGES if snippets(path, "python")], ids=lambda path: path.stem)
def test_python_runs_as_pasted(path, load, tmp_path, monkeypatch, capsys):
    assert str(Path(kvfold.__file__).resolve()).startswith(os.environ.get("KVFOLD_IS_AT", "/"))
    (tmp_path / "document.txt").write_text(STORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kvfold, "load", load)
    names: dict[str, Any] = {}  # what a page shows later goes on from what it showed before
    for text in snippets(path, "python"):
        exec(compile(text, str(path), "exec"), names)
    said = capsys.readouterr().out
    assert said.strip() and (path.stem != "README" or "Blue Heron" in said)


def test_there_are_commands():
    assert len(commands()) > 40


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
    """Parsed to the last flag; not run."""
    words = shlex.split(line, comments=True)[1:]
    command, context = typer.main.get_command(app), None
    while hasattr(command, "resolve_command"):
        context = command.make_context("kvfold", words[:1], parent=context, resilient_parsing=True)
        _, command, words = command.resolve_command(context, words)
    command.make_context("kvfold", words, parent=context)
