"""benchmarks/gpu_check.py, as far as it goes without a GPU: refusals, time, names of files, and the page."""

import datetime
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvfold.bench import kernels, machine
from kvfold.cli.app import app

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks/gpu_check.py"))
DAY = datetime.date(2030, 1, 2)
NAME = "NVIDIA H200 (80GB), PCIe"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """The script with these words, on a machine with this GPU."""

    def call(*words: object, gpu: str | None = None, commands: dict[str, list[str]] | None = None) -> int:
        scope = SCRIPT["main"].__globals__
        monkeypatch.setitem(scope, "gpu_name", lambda: gpu)
        if commands is not None:
            monkeypatch.setitem(scope, "commands", lambda *_: commands)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *map(str, words)])
        return SCRIPT["main"]()

    return call


def test_without_a_gpu_it_says_so(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--out", tmp_path) == 3
    out, err = capsys.readouterr()
    assert out == "" and "there is no CUDA device" in err and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_gpu_is_asked_for():
    assert SCRIPT["gpu_name"]() is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "11"], "minutes=11.0 must be"),
        (["--minutes", "0"], "minutes=0.0 must be"),
        (["--out", "no-such-folder"], "out='no-such-folder' must be a folder"),
        (["--parts", "tests,speed"], "not 'speed'"),
    ],
)
def test_wrong_usage_ends_with_2(run, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        run(*words, gpu=NAME)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_files_are_named_by_gpu_and_day(tmp_path: Path):
    start = SCRIPT["stem"](NAME, DAY)
    assert start == "gpu-nvidia-h200-80gb-pcie-2030-01-02"
    made = SCRIPT["commands"]("m", "bfloat16", tmp_path, start)
    assert list(made) == list(SCRIPT["SHARES"]) == ["tests", "kernels", "formats", "run"]
    assert made["kernels"][-1] == str(tmp_path / f"{start}-kernels.json")
    assert made["run"][-1] == str(tmp_path / f"{start}-run.json")
    assert all(made[name][made[name].index("--device") + 1] == "cuda" for name in ("kernels", "formats", "run"))
    assert all((ROOT / test).is_file() for test in SCRIPT["TESTS"])


def test_the_parts_share_the_time():
    allowed = SCRIPT["allowed"]
    assert sum(SCRIPT["SHARES"].values()) == pytest.approx(1.0)
    assert allowed("tests", 600, 0) == pytest.approx(300)
    assert allowed("kernels", 600, 100) == pytest.approx(200)  # what the tests left
    assert allowed("run", 600, 300) == pytest.approx(300) and allowed("run", 600, 700) == 1.0


def test_what_came_of_a_run_is_written(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    day = datetime.datetime.now(tz=datetime.UTC).date()
    commands = {
        "tests": [sys.executable, "-c", "print('12 passed')"],
        "kernels": [sys.executable, "-c", "print('no memory'); raise SystemExit(1)"],
        "run": [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"],
    }
    assert run("--out", tmp_path, "--minutes", "0.05", gpu=NAME, commands=commands) == 1
    start = SCRIPT["stem"](NAME, day)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{start}-kernels.txt", f"{start}-run.txt", f"{start}-tests.txt", f"{start}.md",
    ]  # fmt: skip
    text = (tmp_path / f"{start}.md").read_text()
    assert f"# {NAME}, {day.isoformat()}" in text and "Tests: 12 passed" in text
    assert all(f"| {part} |" in text for part in ("tests | passed", "kernels | failed", "run | stopped"))
    assert "no memory" in (tmp_path / f"{start}-kernels.txt").read_text()
    assert "kernels failed" in capsys.readouterr().err
    assert run("--out", tmp_path, "--parts", "tests", gpu=NAME, commands=commands) == 0


def test_the_page_reads_what_the_benchmarks_write(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their JSON on the CPU, which has the same fields."""
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 2**20)
    monkeypatch.setattr(kernels, "WORKING_SET", 1)
    start, runner = SCRIPT["stem"](NAME, DAY), CliRunner()
    words = [
        "kernels",
        "--context",
        "40",
        "--batch",
        "2",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / f"{start}-kernels.json"),
    ]
    assert runner.invoke(app, ["bench", *words]).exit_code == 0
    words = ["run", "--model", str(folder), "--methods", "full", "--context", "20", "--batch", "1", "--rounds", "1"]
    more = ["--steps", "1", "--prefill-batch", "0", "--no-quantized", "--out", str(tmp_path / f"{start}-run.json")]
    assert runner.invoke(app, ["bench", *words, *more]).exit_code == 0
    parts = [SCRIPT["Part"](name, "passed", 1.0, "") for name in ("kernels", "run")]
    text = SCRIPT["page"](NAME, DAY, parts, tmp_path, start)
    assert "| float32 | 40 x 2 | kvfold, scattered |" in text and "| DynamicCache |" in text and "| full |" in text
    assert text.count(NAME) == 3 and f"`{start}-run.json`" in text
    parts[1] = SCRIPT["Part"]("run", "stopped", 1.0, "")  # what lies there is another day's
    assert "| DynamicCache |" not in SCRIPT["page"](NAME, DAY, parts, tmp_path, start)
