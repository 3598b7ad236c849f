"""Result folders with a field that is anything: a report is made, or the file is named; nothing else comes out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvfold.evaluation.report import make_report
from report_folders import write_folder

GONE = object()
VALUES = [
    GONE, None, 0, -1, 1, True, "x", "", [], {}, [1], {"a": 1}, 1e308, -1e308, float("nan"), float("inf"), 10**400,
    10**25, "\ud800", [None], [{}], 1.5,
]  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The lines of a folder's files; `sweep.json` is one."""
    folder = write_folder(
        tmp_path_factory.mktemp("whole") / "run", samples=2, lengths=(1024,), tasks=("niah", "agreement")
    )
    return {path.name: path.read_text().splitlines() for path in folder.iterdir()}


def places(data: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield before
    inner = data.items() if isinstance(data, dict) else enumerate(data[:2]) if isinstance(data, list) else ()
    for key, value in inner:
        yield from places(value, (*before, key))


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return None if value is GONE else value
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    if value is GONE:
        del inside[place[-1]]
    else:
        inside[place[-1]] = value
    return data


@given(
    name=st.sampled_from(["results.jsonl", "examples.jsonl", "sweep.json"]), line=st.integers(0, 3),
    where=st.integers(0, 10**6), value=st.sampled_from(VALUES),
)  # fmt: skip
@example(name="results.jsonl", line=0, where=("nbytes",), value=0)
@example(name="results.jsonl", line=0, where=("nbytes",), value=10**400)
@example(name="results.jsonl", line=0, where=("timing", "decode_seconds"), value=1e308)
@example(name="results.jsonl", line=0, where=("queries", 0, "scores"), value={"a": 1})
@example(name="results.jsonl", line=0, where=("queries", 0, "scores", "score"), value=1e308)
@example(name="results.jsonl", line=0, where=("dtype",), value="\ud800")
@example(name="examples.jsonl", line=0, where=("info", "depth"), value=float("inf"))
@example(name="examples.jsonl", line=0, where=("queries", 0, "metric"), value="x")
@example(name="sweep.json", line=0, where=(), value=[1])
def test_a_field_that_is_anything(
    content: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory, name: str, line: int, where: Any,
    value: Any,
) -> None:  # fmt: skip
    lines = {each: list(own) for each, own in content.items()}
    line %= len(lines[name])
    data = json.loads(lines[name][line])
    found = list(places(data))
    place = where if isinstance(where, tuple) else found[where % len(found)]
    lines[name][line] = json.dumps(changed(data, place, value))
    folder = tmp_path_factory.mktemp("damaged") / "run"
    folder.mkdir()
    for each, own in lines.items():
        (folder / each).write_text("\n".join(own) + "\n")
    try:
        report = make_report([folder])
    except ValueError as error:
        assert str(folder) in str(error)
        return
    assert report.markdown().encode() and report.html().encode()
    assert json.dumps([cell.to_dict() for cell in report.cells], allow_nan=False)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\udcff", "", "NaN"])
@pytest.mark.parametrize("name", ["results.jsonl", "examples.jsonl", "sweep.json"])
def test_lines_that_are_no_object(content: dict[str, list[str]], tmp_path: Path, name: str, text: str) -> None:
    for each, own in content.items():
        shown = text if each == name else "\n".join(own)
        (tmp_path / each).write_text(shown + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=f"{name}"):
        make_report([tmp_path])
