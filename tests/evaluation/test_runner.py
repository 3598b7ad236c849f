"""Sweeps: the same results whether they run undisturbed, killed and resumed, in parts, or on Ray."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kvfold
from kvfold.evaluation.records import read_lines
from kvfold.evaluation.report import make_report
from kvfold.evaluation.runner import run_sweep
from kvfold.evaluation.sweep import Sweep, check_sweep


def definition(model: Path, **changes) -> dict:
    given = {
        "name": "test", "models": [str(model)], "methods": ["snapkv", "h2o", "streamingllm"], "budgets": [0.5, 60],
        "tasks": ["agreement(forced=8)", {"task": "kv_retrieval", "protocols": ["agnostic"], "lengths": [700]}],
        "lengths": [300, 400], "samples": 3, "batch": 2,
    }  # fmt: skip
    return {**given, **changes}


def sweep(model: Path, **changes) -> Sweep:
    return check_sweep(definition(model, **changes))


def results(folder: Path) -> list[dict]:
    """Results without what time they took."""
    found = list(read_lines(folder / "results.jsonl"))
    for record in found:
        record.pop("timing", None)
    return found


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Equal but for the last digit of a figure: another process may add up in another order."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scores, others = ([query.pop("scores") for query in record["queries"]] for record in (ours, theirs))
        assert ours == theirs
        assert all(a == pytest.approx(b, rel=1e-4, abs=2e-5) for a, b in zip(scores, others, strict=True))


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    progress = run_sweep(sweep(tiny), folder)
    assert progress.done == progress.total == 3 * 3 * 7 and progress.failed == 0
    return folder


@pytest.mark.slow
def test_every_cell_is_there_once_and_in_order(undisturbed):
    found = results(undisturbed)
    cells = [(r["task"], r["length"], r["method"], r["budget"], r["example"]) for r in found]
    assert len(set(cells)) == len(cells) == 63
    assert cells[0][:4] == ("agreement(forced=8)", 300, "full", None) and cells[-1][:2] == ("kv_retrieval", 700)
    assert {r["protocol"] for r in found if r["task"] == "kv_retrieval"} == {"agnostic"}
    for r in found:
        limit = 1.0 if r["method"] == "full" else 60 / r["prompt_tokens"] if r["budget"] == 60 else r["budget"]
        assert r["kept_tokens"] <= limit * r["prompt_tokens"] + 1e-6
        assert len(r["kept"]) == 64 and sum(r["kept"]) / 64 == pytest.approx(
            r["kept_tokens"] / r["prompt_tokens"], abs=0.02
        )
    examples = list(read_lines(undisturbed / "examples.jsonl"))
    assert len(examples) == 9 and all(each["context"] and each["queries"] for each in examples)


@pytest.mark.slow
def test_the_report_has_every_method_and_task(undisturbed):
    cells = make_report([undisturbed]).cells
    kl = {(c.contender.method, c.contender.budget): c for c in cells if c.unit == "KL" and c.length == "all lengths"}
    assert len(kl) == 7 and all(cell.n == 6 and cell.failed == 0 for cell in kl.values())
    assert kl["full", None].score == 0.0 < kl["snapkv", 60].score


@pytest.mark.slow
def test_parts_make_the_whole(undisturbed, tiny, tmp_path):
    """A sweep may grow: methods, budgets and lengths added later give what they would have given at once."""
    run_sweep(sweep(tiny, methods=["h2o"], budgets=[60], lengths=[400]), tmp_path / "x")
    assert 0 < len(results(tmp_path / "x")) < 63
    run_sweep(sweep(tiny), tmp_path / "x")
    assert results(tmp_path / "x") == results(undisturbed)
    before = (tmp_path / "x" / "results.jsonl").read_bytes()
    run_sweep(sweep(tiny), tmp_path / "x")
    assert (tmp_path / "x" / "results.jsonl").read_bytes() == before


@pytest.mark.slow
def test_failures_stay_until_they_are_retried(undisturbed, tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(kvfold.parse("h2o")), "after_prefill", lambda *_: 1 / 0)
        assert run_sweep(sweep(tiny), tmp_path / "x").failed == 2 * 9
    assert run_sweep(sweep(tiny), tmp_path / "x").failed == 0  # none that are new
    assert sum("error" in record for record in results(tmp_path / "x")) == 2 * 9
    run_sweep(sweep(tiny), tmp_path / "x", retry_failed=True)
    assert results(tmp_path / "x") == results(undisturbed)


def test_a_task_that_cannot_be_made_stops_before_anything_runs(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"forced=400 must be at least 2 and less than length=300"):
        run_sweep(sweep(tiny, tasks=["agreement(forced=400)"]), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(undisturbed, tiny, tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps(definition(tiny)))
    command = [
        sys.executable,
        "-m",
        "kvfold",
        "eval",
        str(tmp_path / "sweep.json"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as the undisturbed run has it: see conftest.py
    chance, kills, lines = random.Random(0), 0, 0
    for _ in range(20):
        run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        path, deadline = tmp_path / "out" / "results.jsonl", time.monotonic() + 120
        wanted = lines + chance.randint(1, 14)
        while run.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= wanted and kills < 4:
                time.sleep(chance.random() / 10)
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        out, err = run.communicate(timeout=120)
        assert run.returncode in (0, -signal.SIGKILL), err.decode()
        if run.returncode == 0:
            break
        kills += 1
        lines = path.read_bytes().count(b"\n")
        with path.open("ab") as file:  # as if it had been killed in the middle of a line
            file.write(b'{"model": "half a li')
    assert kills >= 2, "the sweep ended before it could be killed"
    assert json.loads(out)["failed"] == 0
    assert_same(results(tmp_path / "out"), results(undisturbed))
    assert (tmp_path / "out" / "examples.jsonl").read_bytes() == (undisturbed / "examples.jsonl").read_bytes()


def actors() -> list[int]:
    """Processes of Ray actors that are running a unit."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if command.startswith(b"ray::Remote.run"):
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray", "ignore::FutureWarning:ray", "ignore::ResourceWarning")
def test_on_ray_with_a_worker_that_dies(undisturbed, tiny, tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    from kvfold.evaluation.on_ray import run_on_ray

    killed = []

    def kill_one(progress):
        if progress.done and not killed:
            for pid in actors()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    progress = run_on_ray(sweep(tiny), tmp_path / "out", "local", actors=2, tick=kill_one)
    assert killed, "no actor was running when the first results came"
    assert not ray.is_initialized()
    assert progress.failed == 0 and progress.done == progress.total
    assert_same(results(tmp_path / "out"), results(undisturbed))
