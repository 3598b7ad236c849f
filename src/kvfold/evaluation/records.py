"""Results on disk: one JSON line for each example, method and budget, appended whole or not at all."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kvfold.files import (
    append,
    check_format,
    check_regular,
    cut_unfinished,
    parse_json,
    read_json,
    write_json,
    write_whole,
)
from kvfold.options import shown

KEY = ("model", "dtype", "task", "length", "protocol", "example", "method", "budget")
"""The fields that say what a record is about; a key occurs once in a file."""

ABOUT = ("model", "task", "length", "example")
"""The fields that say which example a line is about."""

RESULTS, EXAMPLES, DEFINITION = "results.jsonl", "examples.jsonl", "sweep.json"
FORMAT = 1
"""Of all three: each line of the first two has it, and files from before it was written have none."""


def key_of(record: Mapping[str, Any]) -> str:
    """A record's key as text."""
    return json.dumps([record[name] for name in KEY], ensure_ascii=False)


def read_lines(path: Path, needed: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The records of a file. What a killed writer left of its last line is passed over.

    Raises ValueError for a line that is no JSON object with the fields `needed`, or of another format, naming it.
    """
    check_regular(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            here = f"{path}, line {number},"
            try:
                found = parse_json(line, "it")
                if not isinstance(found, dict):
                    raise ValueError("it is not an object")
                if missing := [name for name in needed if name not in found]:
                    raise ValueError(f"{missing[0]!r} is missing")
            except ValueError as error:
                raise ValueError(f"{here} is damaged: {error}") from None
            check_format(found.get("format", FORMAT), FORMAT, here)
            yield found


def to_line(record: Mapping[str, Any]) -> bytes:
    """One record as a line. A lone surrogate, which no encoding has, stays the escape that JSON has for it."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def read_sweep(path: Path, **reading: Any) -> dict[str, Any]:
    """What a `sweep.json` says. Raises ValueError for another file, and for one of another format."""
    found = read_json(path, f"{path}", **reading)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it is not an object")
    check_format(found.get("format", FORMAT), FORMAT, f"{path}")
    return found


class Lines:
    """A file of JSON lines to append to; what a killed writer left of its last line is cut off."""

    def __init__(self, path: Path):
        self.path = path
        cut_unfinished(path)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, in one write."""
        append(self.path, b"".join(map(to_line, records)))


class ResultFolder:
    """A folder of results: `results.jsonl`, the `examples.jsonl` that they are about, and `sweep.json`.

    `done` are the keys of all results, `failed` those of failures among them. With `retry_failed` the failures of
    earlier runs are forgotten first. One process writes at a time. Raises ValueError for a folder with another sweep's
    results or damaged files, RuntimeError for one that another process is writing to.
    """

    def __init__(
        self, folder: Path, definition: Mapping[str, Any], about: Mapping[str, Any], *, retry_failed: bool = False
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RuntimeError(f"another process is writing to {folder}") from None
        path = folder / DEFINITION
        if path.exists():
            try:
                before = read_sweep(path).get("sweep")
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            tasks = before.get("tasks", []) if isinstance(before, dict) else None
            if not isinstance(before, dict) or not (
                isinstance(tasks, list) and all(isinstance(x, dict) for x in tasks)
            ):
                raise ValueError(f"{path} is damaged: sweep={shown(before)} must be an object with a list of tasks")
            self._check(before, definition)
        write_json(path, {"format": FORMAT, "sweep": definition, **about}, indent=2)
        if retry_failed:
            good = [record for record in read_lines(folder / RESULTS, KEY) if "error" not in record]
            write_whole(folder / RESULTS, b"".join(map(to_line, good)))
        self._results, self._examples = Lines(folder / RESULTS), Lines(folder / EXAMPLES)
        self.done, self.failed = set[str](), set[str]()
        for record in read_lines(folder / RESULTS, KEY):
            self._count(record)
        self._known = {self._example(record) for record in read_lines(folder / EXAMPLES, ABOUT)}

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted({*before, *now} - {"models", "methods", "budgets", "tasks", "lengths", "protocols"}):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} holds results for {name}={before.get(name)!r}, not {now.get(name)!r}: "
                    "go on with the same sweep, or choose another folder"
                )
        entries = {each.get("task"): each for each in before.get("tasks", [])}
        for each in now.get("tasks", []):
            for name in ("samples", "texts", "data"):
                if entries.get(each["task"], each).get(name) != each.get(name):
                    raise ValueError(
                        f"{self.folder} holds results of {each['task']} for {name}="
                        f"{entries[each['task']].get(name)!r}, not {each.get(name)!r}: choose another folder"
                    )

    def _count(self, record: Mapping[str, Any]) -> None:
        self.done.add(key_of(record))
        if "error" in record:
            self.failed.add(key_of(record))

    @staticmethod
    def _example(record: Mapping[str, Any]) -> str:
        return json.dumps([record[name] for name in ABOUT], ensure_ascii=False)

    def add_examples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add those examples that the folder does not have yet."""
        fresh = [record for record in records if self._example(record) not in self._known]
        if fresh:
            self._examples.append({"format": FORMAT, **record} for record in fresh)
            self._known |= {self._example(record) for record in fresh}

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add results; a key that is there already is an error of the caller's."""
        records = list(records)
        keys = [key_of(record) for record in records]
        assert not self.done & set(keys) and len(set(keys)) == len(keys), "a result would count twice"
        self._results.append({"format": FORMAT, **record} for record in records)
        for record in records:
            self._count(record)

    def finish(self, order: Mapping[str, int]) -> None:
        """Put the results into the order of their keys' numbers; others stay behind them, as they came."""
        records = list(read_lines(self.folder / RESULTS, KEY))
        ranks = [order.get(key_of(record), len(order)) for record in records]
        if ranks != sorted(ranks):
            ordered = [records[i] for i in sorted(range(len(records)), key=ranks.__getitem__)]
            write_whole(self.folder / RESULTS, b"".join(map(to_line, ordered)))

    def close(self) -> None:
        """Let another process write."""
        self._lock.release()
