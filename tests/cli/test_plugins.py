"""Methods of other packages: one that can't be imported, or fails, is named, and everything else goes on."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import kvfold
from kvfold.cli.app import app
from kvfold.evaluation.compare import CompareRow, compare
from kvfold.methods import Method, get_method, list_methods, method, parse
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
LINES = {"missing_import": 2, "no_python": 1, "exits": 2, "raises": 4, "half": 10}


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


# -- methods that fail ---------------------------------------------------------------------------------------


@pytest.fixture
def failing(scratch_methods: object) -> list[str]:
    """Methods that fail when they are bound, at the prompt, and while decoding."""

    def fails(self: Any, *given: Any) -> Any:
        raise KeyError("no such thing")

    found = []
    for event in ("bind", "after_prefill", "after_decode"):
        base = type(f"Fails{event.title()}", (Method,), {"__doc__": "Fails.", event: fails, "__module__": "elsewhere"})
        name = f"fails-{event.replace('_', '-')}"
        method(name, title="Fails", kind="evict", paper="0000.00000")(dataclass(frozen=True)(base))
        found.append(name)
    return found


def rows_of(folder: Path, methods: list[str], budgets: list[Any]) -> tuple[list[CompareRow], list[tuple[str, str]]]:
    model, tokenizer = kvfold.load(folder, progress=False)
    failed: list[tuple[str, str]] = []
    ids = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(0))
    rows = compare(
        model, tokenizer, ids, methods, budgets, max_new_tokens=4,
        failed=lambda name, budget, error: failed.append((name, f"{type(error).__name__}: {error}")),
    )  # fmt: skip
    return rows, failed


def test_a_method_that_fails_is_left_out_and_changes_no_other_row(folder: Path, failing: list[str]) -> None:
    rows, failed = rows_of(folder, ["h2o", *failing, "snapkv"], [16, 24])
    assert {name for name, _ in failed} == set(failing) and len(failed) == 2 * 3
    assert all(why == "KeyError: 'no such thing'" for _, why in failed)
    alone, none = rows_of(folder, ["h2o", "snapkv"], [16, 24])
    assert not none and [(r.method, r.budget) for r in rows] == [(r.method, r.budget) for r in alone]
    for ours, theirs in zip(rows, alone, strict=True):
        assert (ours.answer, ours.nbytes, ours.kl) == (theirs.answer, theirs.nbytes, pytest.approx(theirs.kl, abs=1e-6))


def test_without_a_hearer_the_first_error_comes_before_anything_is_read(folder: Path, failing: list[str]) -> None:
    model, tokenizer = kvfold.load(folder, progress=False)
    said: list[str] = []
    with pytest.raises(KeyError, match="no such thing"):
        compare(model, tokenizer, torch.ones(1, 20, dtype=torch.long), ["h2o", failing[0]], [16], tick=said.append)
    assert said == []


def test_compare_says_what_it_left_out(folder: Path, document: Path, failing: list[str], tmp_path: Path) -> None:
    words = ["compare", "--model", str(folder), "--file", str(document), "--max-new-tokens", "3", "--budget", "16"]
    for methods, rows in ((["h2o", *failing], 2), (failing, 1)):
        chart = tmp_path / "chart.html"
        given = [*words, "--methods", ",".join(methods), "--chart", str(chart)]
        done = CliRunner().invoke(app, [*given, "--json"], catch_exceptions=False)
        found = json.loads(done.stdout)
        assert done.exit_code == 1 and len(found["rows"]) == rows and chart.is_file()
        assert {each["contender"] for each in found["skipped"]} == set(failing)
        assert all(f"left out: {name}: KeyError: 'no such thing'" in done.stderr for name in failing)
        assert CliRunner().invoke(app, given).exit_code == 1
    assert CliRunner().invoke(app, [*words, "--methods", "h2o"]).exit_code == 0


@pytest.mark.slow
def test_compare_of_all_methods_comes_to_its_end(folder: Path, document: Path, failing: list[str]) -> None:
    words = ["compare", "--model", str(folder), "--file", str(document), "--max-new-tokens", "3", "--budget", "0.5"]
    done = CliRunner().invoke(app, [*words, "--methods", "all", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    made, skipped = ({each[key].split()[0] for each in found[name]} for name, key in
                     (("rows", "method"), ("skipped", "contender")))  # fmt: skip
    assert done.exit_code == 1 and not made & skipped
    assert made | skipped == {info.slug for info in list_methods()} and set(failing) <= skipped
    assert {"full", "kvfold", "h2o", "tova"} <= made


@pytest.mark.parametrize("command", ["run", "growth"])
def test_benchmarks_leave_out_what_fails(folder: Path, failing: list[str], command: str) -> None:
    words = ["bench", command, "--model", str(folder), "--methods", ",".join(["full", *failing]), "--steps", "1"]
    words += ["--rounds", "1", "--context", "20,40" if command == "growth" else "30", "--batch", "1", "--json"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and {row["contender"] for row in found["rows"]} >= {"DynamicCache", "full"}
    assert set(failing) <= {each["contender"] for each in found["skipped"]}
