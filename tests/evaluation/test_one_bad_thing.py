"""One bad thing in a sweep, a model, a task, an example, a file, is named; the others go on, the exit code says so."""

import gzip
import io
import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kvfold.evaluation.worker as worker
from kvfold.cli.app import app
from kvfold.evaluation.records import read_lines
from kvfold.evaluation.report import make_report
from kvfold.evaluation.runner import run_sweep
from kvfold.evaluation.sweep import check_sweep
from kvfold.evaluation.tasks import Setting, make_examples
from kvfold.evaluation.tasks.texts import documents

RECORD = {
    "input": "Who?", "context": "Carla wrote it. " * 9, "answers": ["Carla"], "length": 4, "dataset": "hotpotqa",
    "language": "en", "all_classes": None, "_id": "x",
}  # fmt: skip
HALF = "\ud800"


def evaluate(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words), "--json"], catch_exceptions=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six records, of which two hold half a character, in different places."""
    lines: list[dict[str, Any]] = [dict(RECORD) for _ in range(6)]
    lines[1]["context"] = f"Carla {HALF} wrote it."
    lines[4]["answers"] = ["Carla", HALF]
    path = tmp_path / "hotpotqa.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_half_a_character_fails_its_example_alone(tiny: Path, data: Path, tmp_path: Path, caplog: Any) -> None:
    words = ["--tasks", "longbench/hotpotqa", "--data", data, "--models", tiny, "--methods", "h2o", "--budgets", "0.5"]
    words += ["--out", tmp_path / "out"]
    with caplog.at_level(logging.WARNING, "kvfold"):
        done = evaluate(*words)
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    assert (found["records"], found["failed"], found["failures"]) == (12, 4, 4) and "--retry-failed" in done.stderr
    for line in (2, 5):
        assert any(f"hotpotqa.jsonl, line {line} has '\\ud800'" in said for said in caplog.messages)
    records = list(read_lines(tmp_path / "out" / "results.jsonl"))
    failed = {record["example"]: record["error"] for record in records if "error" in record}
    assert set(failed) == {"1", "4"} and "context has '\\ud800' at character" in failed["1"]
    assert "queries[0].answers has '\\ud800'" in failed["4"]
    again = evaluate(*words)
    assert again.exit_code == 1 and json.loads(again.stdout)["failed"] == 0
    assert json.loads(again.stdout)["failures"] == 4 and list(read_lines(tmp_path / "out" / "results.jsonl")) == records
    report = make_report([tmp_path / "out"])
    assert report.html().encode() and report.markdown().encode()


def test_a_sweep_in_which_everything_fails_ends_with_1(tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def never(self: Any, example: Any, **_: Any) -> Any:
        raise RuntimeError("no prompt for anybody")

    monkeypatch.setattr("kvfold.evaluation.prompting.Prompter.prompt", never)
    words = ["--tasks", "agreement(forced=8)", "--models", tiny, "--lengths", 300, "--samples", 2, "--methods", "h2o"]
    done = evaluate(*words, "--budgets", "0.5", "--out", tmp_path / "out")
    assert done.exit_code == 1 and json.loads(done.stdout)["failed"] == 4
    table = CliRunner().invoke(app, ["eval", *map(str, words), "--budgets", "0.5", "--out", str(tmp_path / "out")])
    assert table.exit_code == 1 and "4 of them failures (0 new)" in " ".join(table.stderr.split())


def test_models_after_the_first_are_named_and_passed_over(tiny: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    shutil.copytree(tiny, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 350}))
    given = {
        "models": [str(tiny), str(tmp_path / "nowhere"), str(small)], "methods": ["h2o"], "budgets": [0.5],
        "tasks": ["agreement(forced=8)"], "lengths": [300, 400], "samples": 1,
    }  # fmt: skip
    done = run_sweep(check_sweep(given), tmp_path / "out")
    assert (done.done, done.total, done.failures) == (6, 6, 0) and not done.complete
    nowhere, window = done.problems
    assert "nowhere" in nowhere and "lengths=400 is more than" in window and "small" in window
    (tmp_path / "sweep.json").write_text(json.dumps(given))
    again = evaluate(tmp_path / "sweep.json", "--out", tmp_path / "out")
    assert again.exit_code == 1 and len(json.loads(again.stdout)["problems"]) == 2 and "not tried:" in again.stderr
    with pytest.raises(ValueError, match="nowhere"):  # nothing is lost yet: the first is refused at once
        run_sweep(check_sweep({**given, "models": given["models"][1:]}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("lengths", [[10**9], [2**24], [5000], [0], [-3]])
def test_lengths_are_held_against_the_window_before_a_text_is_built(
    tiny: Path, tmp_path: Path, monkeypatch: Any, lengths: list[int]
) -> None:
    built: list[object] = []
    monkeypatch.setattr(worker, "make_examples", lambda *given: built.append(given))
    given = {"models": [str(tiny)], "methods": ["h2o"], "budgets": [0.5], "tasks": ["niah"]}
    for change in ({"lengths": lengths}, {"tasks": [{"task": "niah", "lengths": lengths}]}):
        with pytest.raises(ValueError, match=rf"lengths.*{lengths[0]}"):
            run_sweep(check_sweep({**given, **change}), tmp_path / "out")
    assert not built and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"samples": 10**9}, {"batch": 10**9}, {"window": 3}])
def test_sizes_that_nobody_has_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        check_sweep({"models": ["m"], "methods": ["h2o"], "budgets": [0.5], "tasks": ["niah"], **change})


# -- files ---------------------------------------------------------------------------------------------------


def packed(kind: str, data: bytes) -> bytes:
    if kind == ".jsonl.gz":
        return gzip.compress(data, mtime=0)
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", zipfile.ZIP_LZMA if kind == ".lzma.zip" else zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hotpotqa.jsonl", data)
    return into.getvalue()


@given(
    kind=st.sampled_from([".jsonl", ".jsonl.gz", ".zip", ".lzma.zip"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    end=st.floats(0.2, 1),
)
def test_damaged_data_files_are_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[float, int]], end: float
) -> None:
    path = tmp_path_factory.mktemp("data") / f"hotpotqa{kind}"
    content = bytearray(packed(kind, b"".join(json.dumps(RECORD).encode() + b"\n" for _ in range(9))))
    for where, what in changes:
        content[int(where * len(content))] = what
    path.write_bytes(content[: int(end * len(content))])
    try:
        made = make_examples("longbench/hotpotqa", Setting(None, data=path))
    except ValueError as error:
        assert "hotpotqa" in str(error)
    else:
        assert len(made) <= 9


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 50_000, "1" * 5000, '{"context": 1e999}', "\ufeff{", "NaN", '"x"'])
def test_lines_that_are_no_record_are_named(tmp_path: Path, text: str) -> None:
    for name in ("hotpotqa.jsonl", "hotpotqa.json"):
        (tmp_path / name).write_text(json.dumps(RECORD) + "\n" + text if name.endswith("l") else text)
        with pytest.raises(ValueError, match=rf"{name}(, (line 2|record 1))?: "):
            make_examples("longbench/hotpotqa", Setting(None, data=tmp_path / name))


def test_a_password_is_said(tmp_path: Path) -> None:
    content = bytearray(packed(".zip", json.dumps(RECORD).encode()))
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(sign) + flags] |= 1  # the bit that says "encrypted"
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.zip: hotpotqa\.jsonl can't be unpacked"):
        make_examples("longbench/hotpotqa", Setting(None, data=tmp_path / "data.zip"))


def test_texts_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"One.\nTwo.\n\xff")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match=r"a\.txt', line 3, is not UTF-8"):
            documents(Setting(None, texts=path))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.jsonl", "{}\n"), ("results.jsonl", "[]\n"), ("results.jsonl", f"{DEEP}\n"),
        ("results.jsonl", "\udcff\n"), ("examples.jsonl", '{"model": "m"}\n'), ("sweep.json", "{}"),
        ("sweep.json", "[]"), ("sweep.json", DEEP), ("sweep.json", '{"sweep": 5}'), ("sweep.json", "\udcff"),
        ("sweep.json", '{"sweep": {"tasks": [5]}}'), ("sweep.json", '{"sweep": {"tasks": 5}}'), ("sweep.json", ""),
    ],
)  # fmt: skip
def test_a_folder_that_is_damaged_is_named_before_anything_runs(
    tiny: Path, tmp_path: Path, name: str, text: str
) -> None:
    given = {"models": [str(tiny)], "methods": ["h2o"], "budgets": [0.5], "tasks": ["agreement(forced=8)"],
             "lengths": [300], "samples": 1}  # fmt: skip
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"{name}.* is damaged"):
        run_sweep(check_sweep(given), tmp_path)
    assert (tmp_path / name).read_text(errors="surrogateescape") == text
