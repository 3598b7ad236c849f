"""Installed packages that offer methods: one that can't be imported is named, and everything else goes on."""

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvfold.cli.app import app
from kvfold.methods import get_method, list_methods, parse
from kvfold.methods.registry import broken_plugins

REGISTER = """
from dataclasses import dataclass
from kvfold.methods.base import Method, method

@method("{slug}", title="Theirs", kind="evict", paper="0000.00000")
@dataclass(frozen=True)
class Theirs(Method):
    'Keeps nothing of its own.'
"""
PACKAGES = {
    "good": (REGISTER.format(slug="theirs"), "good:Theirs"),
    "missing_import": ("\nimport a_package_that_nobody_has\n", "missing_import:Theirs"),
    "no_python": ("def f(:\n", "no_python:Theirs"),
    "exits": ("import sys\nsys.exit(3)\n", "exits:Theirs"),
    "raises": ("\n\n\nraise KeyError('x')\n", "raises:Theirs"),
    "twice": (REGISTER.format(slug="snapkv"), "twice:Theirs"),
    "half": (REGISTER.format(slug="half") + "\nraise RuntimeError('half way')\n", "half:Theirs"),
    "no_such_name": ("x = 1\n", "no_such_name:Theirs"),
    "not_there": (None, "not_there_at_all:Theirs"),
}
LINES = {"missing_import": 2, "no_python": 1, "exits": 2, "raises": 4, "twice": 5, "half": 10}


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scratch_methods: object) -> Iterator[Path]:
    for name, (source, target) in PACKAGES.items():
        about = tmp_path / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(f"[kvfold.methods]\n{name} = {target}\n")
        if source is not None:
            (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    scan = sys.modules["kvfold.methods.registry"]._scan
    scan.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for name in PACKAGES:
        sys.modules.pop(name, None)
    scan.cache_clear()
    list_methods()
    assert broken_plugins() == []


def test_a_package_that_breaks_stops_no_other(plugins: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvfold"):
        slugs = [info.slug for info in list_methods()]
    assert "theirs" in slugs and "half" not in slugs and get_method("snapkv").cls.__module__.startswith("kvfold.")
    assert str(parse("theirs | snapkv(budget=0.5)")).startswith("theirs() | snapkv")
    bad = set(PACKAGES) - {"good"}
    for said in (broken_plugins(), caplog.messages):
        assert len(said) == len(bad)
        for name in bad:
            (one,) = (each for each in said if f"the plugin {name!r} = {PACKAGES[name][1]!r} of {name} " in each)
            assert name not in LINES or f"{name}.py, line {LINES[name]}" in one
    with pytest.raises(ValueError, match=r"method='half' is unknown.*the plugin 'half' = 'half:Theirs'.*half way"):
        parse("half")


def test_commands_go_on_and_the_list_ends_with_1(plugins: Path) -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["methods", "--json"])
    assert listed.exit_code == 1 and "theirs" in {each["slug"] for each in json.loads(listed.stdout)}
    assert runner.invoke(app, ["methods"], env={"COLUMNS": "160"}).exit_code == 1
    assert runner.invoke(app, ["methods", "theirs"]).exit_code == 0


def test_without_plugins_the_list_ends_with_0() -> None:
    assert CliRunner().invoke(app, ["methods", "--json"]).exit_code == 0
