"""Result folders: what is read, what is passed over, and what is refused with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.evaluation.report import read_results
from report_folders import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "run", lengths=(256,), samples=2, tasks=("niah",))


def edit(path: Path, number: int, **fields: Any) -> None:
    """Change fields of a line; "gone" takes them out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    data = json.loads(lines[number - 1]) | fields
    lines[number - 1] = json.dumps({name: value for name, value in data.items() if value != "gone"})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_everything_is_read(folder: Path):
    results = read_results([folder])
    assert len(results.records) == 2 * (1 + 5 * 4) and len(results.texts) == 2
    record = results.records[0]
    assert (record.method, record.budget, record.nbytes / record.full_nbytes) == ("full", None, 1.0)
    assert results.text(record).depth == 0.0 and len(record.kept) == 64
    assert sum(r.error is not None for r in results.records) == 4


def test_a_partial_last_line_is_passed_over(folder: Path):
    whole = read_results([folder])
    path = folder / "results.jsonl"
    data = path.read_bytes()
    last = len(data.splitlines()[-1])
    path.write_bytes(data[: -last // 2])
    assert read_results([folder]).records == whole.records[:-1]


def test_a_last_line_cut_within_a_character_is_passed_over(folder: Path):
    path = folder / "results.jsonl"
    path.write_bytes(path.read_bytes() + b'{"model": "\xe6\xb1')
    assert len(read_results([folder]).records) == 42


def test_a_broken_line_elsewhere_is_named(folder: Path):
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], *lines[2:]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 2, is damaged"):
        read_results([folder])


def test_a_retry_replaces_its_failure(folder: Path):
    path = folder / "results.jsonl"
    before = read_results([folder])
    failed = next(i for i, record in enumerate(before.records) if record.error)
    good = next(i for i, record in enumerate(before.records) if record.method == "h2o" and not record.error)
    lines = path.read_text(encoding="utf-8").splitlines()
    key = {name: json.loads(lines[failed])[name] for name in ("example", "budget")}
    path.write_text("\n".join([*lines, json.dumps(json.loads(lines[good]) | key)]) + "\n", encoding="utf-8")
    after = read_results([folder])
    assert len(after.records) == len(before.records)
    assert sum(r.error is not None for r in after.records) == sum(r.error is not None for r in before.records) - 1


def test_scores_that_are_no_number_are_a_failure(folder: Path):
    query = {"prediction": "?", "scores": {"score": float("nan")}, "tokens": 1}
    edit(folder / "results.jsonl", 1, queries=[query])
    assert read_results([folder]).records[0].error == "the score score is nan"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "other"}, "protocol='other' must be one of aware, agnostic, turns"),
        ({"budget": "x"}, "budget='x' must be a finite number or null"),
        ({"length": 0.5}, "length=0.5 must be an integer or null"),
        ({"kept": [0.5, -2]}, "kept=.* must be a list of shares"),
        ({"full_nbytes": 0}, "full_nbytes=0 must be an integer, at least 1"),
        ({"method": "gone"}, "method is missing and must be a string"),
        ({"timing": 3}, "timing=3 must be an object"),
        ({"queries": [{"prediction": "", "tokens": 1, "scores": {"score": "1"}}]}, "scores=.* must be numbers by name"),
        ({"queries": []}, "queries has 0 items and must have 1"),
        ({"example": "other"}, "example='other' of niah must be in examples.jsonl"),
    ],
)
def test_a_bad_field_is_named_with_its_line(folder: Path, fields: dict[str, Any], message: str):
    edit(folder / "results.jsonl", 3, **fields)
    with pytest.raises(ValueError, match=r"results\.jsonl, line 3.*" + message):
        read_results([folder])


def test_examples_are_checked_too(folder: Path):
    edit(folder / "examples.jsonl", 2, context=5)
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 2: context=5 must be a string"):
        read_results([folder])


def test_folders_without_their_files_and_with_the_same_results_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"must hold sweep\.json"):
        read_results([tmp_path])
    twin = write_folder(tmp_path / "twin", lengths=(256,), samples=2, tasks=("niah",))
    with pytest.raises(ValueError, match="report the folders apart"):
        read_results([folder, twin])
    (twin / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="hold no result"):
        read_results([twin])
    other = write_folder(tmp_path / "other", lengths=(512,), samples=2, tasks=("niah",))
    assert len(read_results([folder, other]).records) == 84
