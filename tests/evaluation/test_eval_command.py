"""`kvfold eval` as a user calls it."""

import json

import pytest
from typer.testing import CliRunner

from kvfold.cli.app import app
from kvfold.evaluation.worker import Worker


def run(*words: object) -> str:
    done = CliRunner().invoke(app, ["eval", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_flags_make_a_sweep_and_a_table(tiny, tmp_path):
    words = ("--tasks", "agreement(forced=8),niah", "--models", tiny, "--methods", "snapkv,h2o", "--budgets", "0.5,40")
    words = (*words, "--lengths", "600", "--samples", 2, "--out", tmp_path / "x")
    found = json.loads(run(*words, "--json"))
    assert found["records"] == 2 * 2 * 5 and found["failed"] == 0
    rows = {(row["method"], row["budget"], row["task"]): row for row in found["rows"]}
    assert rows["full", None, "agreement(forced=8)"]["score"] == 0.0
    assert {row["task"] for row in found["rows"]} >= {"niah", "agreement(forced=8)"}
    done = CliRunner().invoke(app, ["eval", *map(str, words)], env={"COLUMNS": "60"})  # all is there already
    assert {"protocol", "aware", "snapkv", "40"} <= set(done.stdout.split())
    assert f"\nkvfold report {tmp_path / 'x'} --out page.html\n" in done.stderr  # as it can be pasted


def test_a_stopped_sweep_says_that_it_can_go_on(tiny, tmp_path, monkeypatch):
    words = ["eval", "--tasks", "agreement(forced=8),niah", "--models", str(tiny), "--methods", "h2o", "--lengths"]
    words += ["300", "--samples", "1", "--out", str(tmp_path / "x")]
    run_unit, stopped = Worker.run, []

    def stop_second(self, *args):
        stopped.append(args)
        if len(stopped) == 2:
            raise KeyboardInterrupt
        return run_unit(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "run", stop_second)
        done = CliRunner().invoke(app, words)
    assert done.exit_code not in (0, 2) and "the same command goes on with what is in" in done.stderr
    assert CliRunner().invoke(app, words).exit_code == 0 and len(stopped) == 2


def test_a_file_and_what_flags_change_in_it(tiny, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"models: [{tiny}]\nmethods: [h2o]\nbudgets: [0.5]\nlengths: [300]\ntasks: [agreement]\nsamples: 1\n"
    )
    run(path, "--budgets", "0.25", "--out", tmp_path / "x")
    sweep = json.loads((tmp_path / "x" / "sweep.json").read_text())["sweep"]
    assert sweep["name"] == "mine" and sweep["budgets"] == [0.25] and sweep["samples"] == 1


def test_the_list_has_tasks_and_suites():
    found = json.loads(run("--list", "--json"))
    assert "smoke" in found["suites"]
    tasks = {each["name"]: each for each in found["tasks"]}
    assert tasks["niah"]["options"]["keys"] == 1 and tasks["ruler/vt"]["paper"] == "2404.06654"
    assert sum(name.startswith("ruler/") for name in tasks) == 13
    assert "longbench/hotpotqa" in tasks and not tasks["longbench/hotpotqa"]["sized"]
    assert "niah" in run("--list")


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "name a sweep file, --suite, or --tasks"),
        (("x.yaml", "--suite", "smoke"), "name one of them"),
        (("--tasks", "niah", "--lengths", "1k"), "lengths='1k' must be whole numbers"),
        (("--suite", "smok"), "suite='smok' is unknown; there are curves, leaderboard, needles, retrieval, smoke"),
        (("--tasks", "niah", "--budgets", "2.0"), "budget=2.0 must be a fraction"),
    ],
)
def test_wrong_usage_is_named(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*words, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
