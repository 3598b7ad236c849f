"""Results on disk: one JSON line for each example, method and budget, appended whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

KEY = ("model", "dtype", "task", "length", "protocol", "example", "method", "budget")
"""The fields that say what a record is about; a key occurs once in a file."""

ABOUT = ("model", "task", "length", "example")
"""The fields that say which example a line is about."""

RESULTS, EXAMPLES, DEFINITION = "results.jsonl", "examples.jsonl", "sweep.json"


def key_of(record: Mapping[str, Any]) -> str:
    """A record's key as text."""
    return json.dumps([record[name] for name in KEY], ensure_ascii=False)


def read_lines(path: Path, needed: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The records of a file. What a killed writer left of its last line is passed over.

    Raises ValueError for any other line that is no JSON object with the fields `needed`, naming it.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
                if not isinstance(found, dict):
                    raise ValueError("not an object")
                if missing := [name for name in needed if name not in found]:
                    raise ValueError(f"{missing[0]!r} is missing")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}, is damaged: {error}") from None
            yield found


def _sweep_in(path: Path) -> dict[str, Any]:
    """The definition in a `sweep.json`. Raises ValueError for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sweep"]
        if not isinstance(found, dict) or not all(isinstance(each, dict) for each in found.get("tasks", [])):
            raise ValueError("it holds no sweep")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    return found


def write_whole(path: Path, data: bytes) -> None:
    """A file that is there completely or not at all: written under a temporary name, then renamed."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def to_line(record: Mapping[str, Any]) -> bytes:
    """One record as a line. A lone surrogate, which no encoding has, stays the escape that JSON has for it."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


class Lines:
    """A file of JSON lines to append to; what a killed writer left of its last line is cut off."""

    def __init__(self, path: Path):
        self.path = path
        if path.exists():
            with path.open("rb+") as file:
                data = file.read()
                file.truncate(data.rfind(b"\n") + 1)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records, in one write."""
        data = b"".join(map(to_line, records))
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


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
            self._check(_sweep_in(path), definition)
        write_whole(path, json.dumps({"sweep": definition, **about}, indent=2, ensure_ascii=False).encode() + b"\n")
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
            self._examples.append(fresh)
            self._known |= {self._example(record) for record in fresh}

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add results; a key that is there already is an error of the caller's."""
        records = list(records)
        keys = [key_of(record) for record in records]
        assert not self.done & set(keys) and len(set(keys)) == len(keys), "a result would count twice"
        self._results.append(records)
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
