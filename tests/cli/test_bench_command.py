"""`kvfold bench`: what it prints, writes, draws and refuses; no test looks at how long anything took."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvfold.bench import kernels, machine, peers
from kvfold.cli import main
from kvfold.cli.app import app

runner = CliRunner()
MACHINE = {
    "cpu", "cores", "usable_cores", "threads", "memory_bytes", "system", "device", "gpu", "versions", "command",
    "cores_busy_elsewhere", "instructions", "beside", "huge_pages",
}  # fmt: skip
SPREAD = {"median", "min", "max", "count"}
RUN_ROW = {"contender", "library", "budget", "separate_process", "decode", "prefill", "memory", "peer"}
DECODE = {
    "batch", "context", "step_seconds", "round_seconds", "tokens_per_second", "kv_bytes", "kv_ratio", "kept_tokens",
    "bound_seconds", "bound_tokens_per_second", "of_bound", "speedup", "bound_speedup", "floor_seconds",
    "floor_bound_seconds", "parts", "times_peers", "beside_seconds", "keeps",
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
        set(found) == {"format", "bench", "machine", "rounds", "read_bandwidth", "arithmetic", "rows"}
        and found["bench"] == "kernels"
    )
    assert [(each["dtype"], each["group"]) for each in found["arithmetic"]] == [("bfloat16", 3)]
    assert set(found["machine"]) == MACHINE
    assert len(found["rows"]) == 2 * (3 + 2 + 3)
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


def test_each_round_is_played_once_more_beside_busy_programs(folder: Path) -> None:
    found = got("kernels", "--context", "40", "--batch", "1", "--rounds", "2", "--dtype", "float32", "--beside", "1")
    assert found["machine"]["beside"] == 1
    for row in found["rows"]:
        assert row["beside_seconds"]["count"] == 2
        assert row["keeps"] == pytest.approx(row["seconds"]["median"] / row["beside_seconds"]["median"])
    words = ["run", "--model", folder, "--methods", "full", "--context", "30", "--batch", "1", "--steps", "2"]
    words += ["--rounds", "2", "--prefill-batch", "0", "--no-quantized", "--beside", "1"]
    for row in got(*words)["rows"]:
        assert row["decode"]["beside_seconds"]["count"] == 4 and row["decode"]["keeps"]["count"] == 2
    result = runner.invoke(app, ["bench", *map(str, words)], env={"COLUMNS": "300"})
    assert "keeps" in result.stdout and "beside: 1 busy" in result.stdout


def test_run_prints_a_table_and_draws(folder: Path, tmp_path: Path) -> None:
    words = ["bench", "run", "--model", str(folder), "--methods", "tova", "--context", "30", "--batch", "1"]
    more = ["--steps", "1", "--rounds", "1", "--prefill-batch", "0", "--chart", str(tmp_path / "r.html")]
    result = runner.invoke(app, [*words, *more, "--no-quantized"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "DynamicCache" in result.stdout and "at most" in result.stdout and "left out" not in result.stdout
    assert "Where a step goes" in result.stdout and "brackets" in result.stdout
    assert "tova 0.2" in (tmp_path / "r.html").read_text()


def test_growth_as_json_and_as_a_table(folder: Path, tmp_path: Path) -> None:
    words = ["growth", "--model", folder, "--methods", "full,h2o", "--budget", "16", "--steps", "1", "--rounds", "1"]
    found = got(*words, "--context", "64,32")
    assert [(row["contender"], row["context"]) for row in found["rows"]] == [
        (name, t) for t in (32, 64) for name in ("DynamicCache", "full", "h2o")
    ]
    rates = {(each["contender"], each["measure"]): each["exponent"] for each in found["exponents"]}
    assert len(rates) == 3 * 3 and rates["DynamicCache", "kv_bytes"] == 1.0 and rates["h2o", "kv_bytes"] == 0.0
    assert (found["window"], found["chunk"], found["prefills"]) == (512, None, 1)
    more = ["--context", "20,540", "--chunk", "128", "--no-dynamic", "--chart", str(tmp_path / "g.html")]
    result = runner.invoke(app, ["bench", *map(str, words), *more])
    assert result.exit_code == 0 and "exponent" in result.stdout and "streamingllm" not in result.stdout
    assert "window of 512 tokens only the cost counts" in result.stdout and "DynamicCache" not in result.stdout
    assert "h2o, from 20 to 540 tokens: a step takes" in result.stdout and "chunks of 128" in result.stdout
    assert "shortest context" in (tmp_path / "g.html").read_text()


def test_reading_as_json_and_as_a_table(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i}" for i in range(400)))
    words = ["reading", "--model", folder, "--methods", "quest(dense=0,page=4),tokenselect", "--budget", "0.25"]
    words += ["--context", "96", "--tokens", "5", "--watched", "2", "--file", text]
    found = got(*words)
    full, quest, tokenselect = found["rows"]
    assert [row["method"] for row in found["rows"]] == ["full", "quest(dense=0,page=4)", "tokenselect"]
    assert full["kl"] == 0 and full["recall"] is None and full["index_bytes"] == 0
    assert 0 < quest["recall"] <= 1 and 0 < quest["read"] < 1 and quest["index_bytes"] > 0
    assert tokenselect["nbytes"] > quest["nbytes"] > full["nbytes"] and tokenselect["kl"] > 0
    result = runner.invoke(app, ["bench", *map(str, words)])
    assert result.exit_code == 0 and "tokenselect" in result.stdout and "recall" in result.stdout


def test_reading_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words")
    said = refused(monkeypatch, capsys, "reading", "--model", folder, "--file", text, "--context", "50")
    assert "context=50 and tokens=48 must be at most the text's" in said
    said = refused(monkeypatch, capsys, "reading", "--model", folder, "--file", tmp_path / "none.txt")
    assert "none.txt" in said


PEER = """
import json, sys
PRESSES = {"full": None, "snapkv": None, "tova": None}
words = sys.argv[2:]
options = dict(zip(words[::2], words[1::2]))
asked = []
print("words of a library", file=sys.stderr)
for line in sys.stdin:
    ask = json.loads(line)
    asked.append(ask)
    if ask["method"] == "tova" and ask["do"] == "fill":
        found = {"error": "MemoryError: no memory left"}
    elif ask["do"] == "read":
        found = {"seconds": 3.0}
    elif ask["do"] == "fill":
        found = {"kv_bytes": 1000}
    elif ask["do"] == "decode":
        found = {"seconds": [0.5] * ask["steps"]}
    else:
        found = {"peak_rss_bytes": 5, "options": options, "turns": sys.argv[1], "asked": asked}
    print(json.dumps(found), flush=True)
"""


@pytest.fixture(params=["kvpress", "vllm"])
def peer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """A Python that claims to have a peer, in a checkout whose peer scripts say what they are asked."""
    folder = tmp_path / "benchmarks/peers"
    folder.mkdir(parents=True)
    for name in peers.SCRIPTS.values():
        (folder / name).write_text(PEER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peers, "PAUSE", 0.0)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {request.param} && exit 0\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python, request.param


def test_a_peer_takes_turns(folder: Path, peer: tuple[Path, str]) -> None:
    python, library = peer
    words = ["run", "--model", folder, "--methods", "full,snapkv,kvmerger,tova", "--budget", "16", "--context", "64"]
    found = got(*words, "--batch", "2", "--steps", "1", "--rounds", "2", "--peer-python", python, "--no-quantized")
    rows = [row for row in found["rows"] if row["separate_process"]]
    methods = ["full", "snapkv"] if library == "kvpress" else ["full"]
    assert [(row["contender"], row["library"]) for row in rows] == [(method, library) for method in methods]
    said, dense, last = rows[-1]["peer"], found["rows"][0], rows[-1]["decode"]
    assert (said["turns"], said["options"]["--batch"], said["options"]["--model"]) == ("--turns", "2", str(folder))
    own = [ask for ask in said["asked"] if ask["method"] == methods[-1]]
    assert [ask["do"] for ask in own] == ["read"] * 3 + ["fill"] + ["decode"] * 3 + ["report"]  # the first warms up
    assert {ask["budget"] for ask in own} == {0.25 if library == "kvpress" else 1.0}
    assert [(ask["rows"], ask["context"]) for ask in own[:3]] == [(1, 64)] * 3
    assert rows[-1]["prefill"]["ratio_dynamic"] == pytest.approx(3.0 / dense["prefill"]["seconds"]["median"])
    ratios = [seconds / 0.5 for seconds in dense["decode"]["round_seconds"]]
    assert (last["speedup"]["min"], last["speedup"]["max"]) == pytest.approx((min(ratios), max(ratios)))
    bound = (found["weight_bytes"] + 1000) / found["read_bandwidth"]["bytes_per_second"]
    assert last["bound_seconds"] == pytest.approx(bound) and last["parts"] is None and last["floor_seconds"] is None
    ours = dense["decode"]["times_peers"][f"full ({library}, own process)"]
    assert ours["max"] == pytest.approx(0.5 / min(dense["decode"]["round_seconds"]))
    if library == "kvpress":
        reasons = {each["contender"]: each["reason"] for each in found["skipped"]}
        assert "no press" in reasons["kvpress kvmerger"]
        assert "no memory left" in reasons["tova (kvpress, own process)"]


@pytest.mark.slow
def test_peaks_come_from_processes_of_their_own(folder: Path) -> None:
    words = ["run", "--model", folder, "--methods", "full", "--context", "30", "--batch", "1", "--steps", "1"]
    found = got(*words, "--rounds", "1", "--prefill-batch", "0", "--no-quantized", "--peak")
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
    said = refused(monkeypatch, capsys, *words, "--peer-python", none)
    assert "can't import one of kvpress, vllm: ModuleNotFoundError" in said
    assert "can't import one of" in refused(monkeypatch, capsys, *words, "--peer-python", sys.executable)
