"""The files of a benchmark: found in a folder or on the Hugging Face hub, and read record by record."""

import gzip
import importlib
import json
import logging
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from kvfold.evaluation.benchmarks._records import PublishedRecord
from kvfold.evaluation.tasks.base import Setting

SUFFIXES = (".jsonl", ".json", ".parquet")
BROKEN = (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError)
"""What archives raise that are cut or damaged."""
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Source:
    """Where a set of records is published.

    `names`: patterns of its file below `setting.data`, tried in order; "archive.zip!member" looks into an archive.
    `repository`: its data set on the hub, of which `file` is fetched (it may be "archive.zip!member" too); without
    `file`, `datasets` loads `config` and `split`. `hub`: False where the hub has no copy, and a path must be given.
    """

    names: tuple[str, ...]
    repository: str
    file: str = ""
    config: str | None = None
    split: str = "test"
    hub: bool = True


def records(setting: Setting, source: Source) -> Iterator[PublishedRecord]:
    """The records of a source, one after another, from `setting.data` or else from the hub.

    Raises ValueError where a file is not there or not in its format, RuntimeError where the hub fails.
    """
    if setting.data is None:
        yield from _from_hub(source)
        return
    for path, member in _find(Path(setting.data), source.names):
        yield from _read(path, member)


def _find(data: Path, names: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Files (and members of archives) that the first fitting name stands for."""
    if not data.exists():
        raise ValueError(f"data={str(data)!r} does not exist")
    if data.is_file() and data.suffix != ".zip":
        return [(data, "")]
    for name in names:
        archive, _, member = name.rpartition("!")
        if data.is_file():
            found = _members(data, member)
        elif archive:
            found = [pair for path in sorted(data.glob(archive)) for pair in _members(path, member)]
        else:
            found = [(path, "") for path in sorted(data.glob(name))]
        if found:
            return found
    raise ValueError(f"data={str(data)!r} has none of these files: {', '.join(names)}")


def _members(path: Path, pattern: str) -> list[tuple[Path, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if PurePosixPath(name).match(pattern))
    except BROKEN as error:
        raise ValueError(f"{path.name}: this file is broken ({error})") from error
    return [(path, name) for name in names]


def _from_hub(source: Source) -> Iterator[PublishedRecord]:
    """What `repository` holds. Files are read here and not by `datasets`, which runs no scripts and mixes no types."""
    if not source.hub:
        raise ValueError(
            f"data=None: {source.repository} is not on the Hugging Face hub; fetch its files and name them with --data"
        )
    try:
        if source.file:
            name, _, member = source.file.partition("!")
            hub = importlib.import_module("huggingface_hub")
            path = Path(hub.hf_hub_download(source.repository, name, repo_type="dataset"))
            rows = _read(path, member)
        else:
            load = importlib.import_module("datasets").load_dataset
            rows = _number(load(source.repository, source.config, split=source.split), source.repository, "row")
    except Exception as error:  # the hub's client and `datasets` raise errors of many families
        raise RuntimeError(
            f"{source.repository} could not be loaded from the Hugging Face hub ({type(error).__name__}: {error}); "
            'name its published files with --data, or see that the network and `pip install "kvfold[eval]"` are there'
        ) from error
    yield from rows


def _read(path: Path, member: str) -> Iterator[PublishedRecord]:
    try:
        yield from _rows(path, member)
    except BROKEN as error:
        raise ValueError(f"{member or path.name}: this file is broken ({error})") from error


def _rows(path: Path, member: str) -> Iterator[PublishedRecord]:
    name = PurePosixPath(member or path.name)
    kind = name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix
    if kind == ".parquet" and not member:
        yield from _number(_parquet(path), name.name, "row")
        return
    if kind not in (".jsonl", ".json"):
        raise ValueError(f"{name.name}: files must end in {', '.join(SUFFIXES)} (the first two also in .gz or a .zip)")
    with ExitStack() as stack:
        stream: Any
        if member:
            archive = stack.enter_context(zipfile.ZipFile(path))
            try:
                stream = stack.enter_context(archive.open(member))
            except (NotImplementedError, RuntimeError) as error:  # another compression, or a password
                raise ValueError(f"{path.name}: {member} can't be unpacked ({error})") from error
        else:
            stream = stack.enter_context(path.open("rb"))
            if name.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=stream)
        if kind == ".jsonl":
            for line, content in enumerate(stream, start=1):
                if content.strip():
                    yield _record(_parse(content, f"{name.name}, line {line}"), f"{name.name}, line {line}")
        else:
            whole = _parse(stream.read(), name.name)
            yield from _number(whole if isinstance(whole, list) else [whole], name.name, "record")


def _parquet(path: Path) -> list[Any]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise RuntimeError(f'{path.name}: parquet files need `pip install "kvfold[eval]"`') from error
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except Exception as error:  # of pyarrow's own families
        raise ValueError(f"{path.name}: this file is broken ({error})") from error
    return rows


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: this file is broken, no UTF-8 ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this is no JSON ({error})") from None


def _number(rows: Any, where: str, unit: str) -> Iterator[PublishedRecord]:
    for number, row in enumerate(rows, start=1):
        yield _record(row, f"{where}, {unit} {number}")


def _record(value: Any, where: str) -> PublishedRecord:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: this is a {type(value).__name__}; it must be an object with named fields")
    if found := next(filter(None, map(_HALF.search, _texts(value))), None):
        logging.getLogger("kvfold").warning(
            "%s has %r, which is half a character (a lone surrogate): what is asked of it will fail", where, found[0]
        )
    return PublishedRecord(where, value)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a record."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            waiting += each
