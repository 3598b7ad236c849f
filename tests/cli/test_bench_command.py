"""`kvfold bench`: what it prints, writes, draws and refuses; no test looks at how long anything took."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvfold.bench import kernels, machine
from kvfold.cli import main
from kvfold.cli.app import app

runner = CliRunner()
MACHINE = {
    "cpu", "cores", "usable_cores", "threads", "memory_bytes", "system", "device", "gpu", "versions", "command",
    "cores_busy_elsewhere", "instructions", "beside",
}  # fmt: skip
SPREAD = {"median", "min", "max", "count"}
RUN_ROW = {"contender", "library", "budget", "separate_process", "decode", "prefill", "memory", "peer"}
DECODE = {
    "batch", "context", "step_seconds", "round_seconds", "tokens_per_second", "kv_bytes", "kv_ratio", "kept_tokens",
    "bound_seconds", "bound_tokens_per_second", "of_bound", "speedup", "bound_speedup",
}  # fmt: skip
PREFILL = {"batch", "context", "seconds", "tokens_per_second", "ratio_dynamic", "ratio_full", "peak_cuda_bytes"}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.READ_BYTES, "cpu", 2**20)
    monkeypatch.setattr(kernels, "WORKING_SET", 1)


def got(*words: object, env: dict[str, str] | None = None) -> Any:
    """The JSON that `kvfold bench words... --json` prints."""
    result = runner.invoke(app, ["bench", *map(str, words), "--json"], env=env)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Standard error of `kvfold bench words...`, which must end with 2 and print nothing."""
    monkeypatch.setattr(sys, "argv", ["kvfold", "bench", *map(str, words)])
    with pytest.raises(SystemExit) as exit_:
        main()
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, ""), err
    return err


def test_kernels_as_json_with_file_and_chart(tmp_path: Path) -> None:
    words = ["kernels", "--context", "40,70", "--batch", "2", "--head-dim", "32", "--rounds", "1", "--ragged"]
    files = ["--out", tmp_path / "k.json", "--chart", tmp_path / "k.html"]
    found = got(*words, *files, "--dtype", "bfloat16")
    assert found["format"] == 1
    assert (
        set(found) == {"format", "bench", "machine", "rounds", "read_bandwidth", "rows"} and found["bench"] == "kernels"
    )
    assert set(found["machine"]) == MACHINE
    assert len(found["rows"]) == 2 * 2 * 2
    for row in found["rows"]:
        assert set(row["seconds"]) == SPREAD
        assert (row["dtype"], row["batch"], row["kv_heads"], row["group"], row["head_dim"]) == ("bfloat16", 2, 3, 3, 32)
        share = row["bytes_per_second"] / found["read_bandwidth"]["bytes_per_second"]
        assert row["of_bandwidth"] == pytest.approx(share)
    assert json.loads((tmp_path / "k.json").read_text()) == found
    assert "https://cdn" not in (tmp_path / "k.html").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.html", "k.json"]


def test_run_as_json(folder: Path) -> None:
    words = ["run", "--model", folder, "--methods", "full,snapkv", "--budget", "16", "--context", "64", "--batch", "2"]
    found = got(*words, "--steps", "2", "--rounds", "1", "--prefill-batch", "1")
    assert set(found) == {
        "bench", "machine", "model", "dtype", "context", "batch", "prefill_batch", "steps", "rounds", "weight_bytes",
        "read_bandwidth", "rows", "skipped", "probe_seconds", "format", "fast_linears",
    }  # fmt: skip
    assert {row["contender"] for row in found["rows"]} >= {"DynamicCache", "full", "snapkv"}
    for row in found["rows"]:
        assert set(row) == RUN_ROW and set(row["decode"]) == DECODE and set(row["prefill"]) == PREFILL
        assert set(row["decode"]["step_seconds"]) == set(row["prefill"]["seconds"]) == SPREAD
        assert (row["decode"]["batch"], row["prefill"]["batch"], row["memory"]) == (2, 1, None)
    assert found["rows"][-1]["decode"]["kept_tokens"] == 16
    assert all(set(each) == {"contender", "reason"} for each in found["skipped"])


def test_run_prints_a_table_and_draws(folder: Path, tmp_path: Path) -> None:
    words = ["bench", "run", "--model", str(folder), "--methods", "tova", "--context", "30", "--batch", "1"]
    more = ["--steps", "1", "--rounds", "1", "--prefill-batch", "0", "--chart", str(tmp_path / "r.html")]
    result = runner.invoke(app, [*words, *more, "--no-quantized"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "DynamicCache" in result.stdout and "at most" in result.stdout and "left out" not in result.stdout
    assert "tova 0.2" in (tmp_path / "r.html").read_text()


def test_growth_as_json_and_as_a_table(folder: Path) -> None:
    words = ["growth", "--model", folder, "--methods", "full,h2o", "--budget", "16", "--steps", "1", "--rounds", "1"]
    found = got(*words, "--context", "64,32")
    assert [(row["contender"], row["context"]) for row in found["rows"]] == [
        (name, t) for t in (32, 64) for name in ("DynamicCache", "full", "h2o")
    ]
    rates = {(each["contender"], each["measure"]): each["exponent"] for each in found["exponents"]}
    assert len(rates) == 3 * 3 and rates["DynamicCache", "kv_bytes"] == 1.0 and rates["h2o", "kv_bytes"] == 0.0
    result = runner.invoke(app, ["bench", *map(str, words), "--context", "20,40"])
    assert result.exit_code == 0 and "exponent" in result.stdout and "streamingllm" not in result.stdout


PEER = """
import json, sys
PRESSES = {"full": None, "snapkv": None, "tova": None}
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options["--method"] == "tova":
    sys.exit("no memory left")
print("words before")
print(json.dumps({"prefill_seconds": 3.0, "step_seconds": 0.5, "decode_tokens_per_second": 4.0, "kv_bytes": 1000,
                  "peak_rss_bytes": 5, "options": options}))
"""


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that claims to have kvpress, in a checkout whose peer script only says what it was asked."""
    script = tmp_path / "benchmarks/peers/kvpress_peer.py"
    script.parent.mkdir(parents=True)
    script.write_text(PEER)
    monkeypatch.chdir(tmp_path)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def test_a_peer_joins_the_rows(folder: Path, peer: Path) -> None:
    words = ["run", "--model", folder, "--methods", "full,snapkv,kvmerger,tova", "--budget", "16", "--context", "64"]
    found = got(*words, "--batch", "2", "--steps", "1", "--rounds", "1", "--peer-python", peer, "--no-quantized")
    rows = [row for row in found["rows"] if row["separate_process"]]
    assert [(row["contender"], row["library"]) for row in rows] == [("full", "kvpress"), ("snapkv", "kvpress")]
    asked, dense = rows[1]["peer"]["options"], found["rows"][0]
    assert (asked["--budget"], asked["--batch"], asked["--model"]) == ("0.25", "2", str(folder))
    assert rows[1]["peer"]["prefill_run"]["options"]["--batch"] == "1"
    seconds = dense["prefill"]["seconds"]["median"]
    assert rows[1]["peer"]["prefill_run"]["ratio_dynamic"] == pytest.approx(3.0 / seconds)
    assert rows[1]["peer"]["speedup"] == pytest.approx(dense["decode"]["step_seconds"]["median"] / 0.5)
    bound = (found["weight_bytes"] + 1000) / found["read_bandwidth"]["bytes_per_second"]
    assert rows[1]["peer"]["bound_seconds"] == pytest.approx(bound)
    reasons = {each["contender"]: each["reason"] for each in found["skipped"]}
    assert "no press" in reasons["kvpress kvmerger"] and "no memory left" in reasons["kvpress tova"]


@pytest.mark.slow
def test_peaks_come_from_processes_of_their_own(folder: Path) -> None:
    words = ["run", "--model", folder, "--methods", "full", "--context", "30", "--batch", "1", "--steps", "1"]
    found = got(*words, "--rounds", "1", "--prefill-batch", "0", "--no-quantized", "--memory")
    for row in found["rows"]:
        assert row["memory"]["kv_bytes"] >= row["decode"]["kv_bytes"]
        if row["memory"]["peak_resident_bytes"] is not None:
            assert row["memory"]["peak_resident_bytes"] > row["memory"]["kv_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kernels", "--context", "1k"], "context='1k' must be positive whole numbers"),
        (["kernels", "--batch", "0"], "batch='0' must be"),
        (["kernels", "--dtype", "int8"], "dtype='int8' must be float32"),
        (["kernels", "--formats", "snapkv"], "formats='snapkv' must be a method of kind quantize"),
        (["kernels", "--device", "tpu"], "device='tpu'"),
        (["kernels", "--chart", "a.pdf"], "chart='a.pdf' must end in"),
        (["kernels", "--out", "a.txt"], "out='a.txt' must be a .json file"),
        (["run", "--model", "never-loaded", "--methods", "nope"], "method='nope' is unknown"),
        (["run", "--model", "never-loaded", "--budget", "1.5"], "budget=1.5 must be a fraction"),
        (["run", "--model", "never-loaded", "--peer-python", "no-such-python"], "never-loaded"),
        (["run", "--rounds", "0"], "--rounds"),
        (["growth", "--model", "never-loaded", "--context", "64"], "at least two different"),
        (["growth", "--model", "never-loaded", "--dtype", "fp8"], "dtype='fp8'"),
    ],
)
def test_wrong_usage_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert said in refused(monkeypatch, capsys, *words)


def test_a_text_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    err = refused(monkeypatch, capsys, "run", "--model", folder, "--context", "510", "--steps", "9")
    assert "the model's context is 512" in err


def test_a_peer_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    words = ["run", "--model", folder, "--context", "16"]
    assert "is not a program" in refused(monkeypatch, capsys, *words, "--peer-python", "no-such-python")
    none = tmp_path / "python"
    none.write_text("#!/bin/sh\necho 'ModuleNotFoundError: kvpress' >&2\nexit 1\n")
    none.chmod(0o755)
    assert "can't import kvpress: ModuleNotFoundError" in refused(monkeypatch, capsys, *words, "--peer-python", none)
