"""Files that kvfold writes and reads: whole or not at all, as the umask says, with the number of their format."""

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvfold.options import shown

JSON_LIMIT = 64 << 20
"""Bytes of the largest JSON file that is read: parsed it takes some thirty times as much."""
NAMELESS = re.compile(r"\.kvfold-(\d+)-[0-9a-f]{16}\.part")
KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def check_regular(path: str | os.PathLike[str], argument: str = "path") -> None:
    """Raise ValueError for a folder, a device, a pipe: what is there must be a regular file, or nothing.

    So for what names no file: an empty text (which would be the folder that one is in), bytes, a descriptor's number.
    """
    try:
        name: object = os.fspath(path)
    except TypeError:
        name = None
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{argument}={shown(path)} must be the path of a file, as text")
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if kind != stat.S_IFREG:
        raise ValueError(f"{argument}={os.fspath(path)!r} is {KINDS.get(kind, 'something else')}, not a regular file")


@contextmanager
def replacing(path: str | os.PathLike[str], argument: str = "path") -> Iterator[Path]:
    """The name of an empty file beside `path`; it takes that one's place when the block is over, or goes if it fails.

    What stands at `path` is the old file or the new one, never a part. A new file has the mode that the umask says, one
    that is there keeps its own; a link goes on pointing where it did. Raises ValueError where something else than a
    regular file is there, FileNotFoundError where the folder is not.
    """
    check_regular(path, argument)
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{argument}={os.fspath(path)!r}: there is no folder {str(target.parent)!r}")
    # The end of the name stays: some writers look at it.
    part = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(8)}{target.suffix}")
    try:
        with part.open("xb"):  # made by open, not by tempfile, which makes files that only their owner can read
            if target.exists():
                part.chmod(stat.S_IMODE(target.stat().st_mode))
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        part.chmod(mode)  # safetensors puts a file of its own there, which only its owner can read
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_folder(path: str | os.PathLike[str], make: Callable[[Path], object], argument: str = "path") -> None:
    """Make a folder at `path`, whole or not at all: `make` fills one beside it, which takes the name when that is done.

    Raises ValueError where something is there, FileNotFoundError where the folder around it is not.
    """
    target = check_new(path, argument)
    working = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}")
    working.mkdir()  # not by tempfile, whose folders only their owner can read
    try:
        make(working)
        check_new(path, argument)  # a rename would take the place of an empty folder
        working.rename(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def check_new(path: str | os.PathLike[str], argument: str = "path") -> Path:
    """Where `write_folder` would make a folder; raises what it raises, before anything is made."""
    target = Path(path).absolute()
    if os.path.lexists(target):
        raise ValueError(f"{argument}={os.fspath(path)!r} is there already: name a folder that is not")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{argument}={os.fspath(path)!r}: there is no folder {str(target.parent)!r}")
    return target


def write_whole(
    path: str | os.PathLike[str], content: bytes | Callable[[Path], object], argument: str = "path"
) -> None:
    """Write a file by `replacing`: these bytes, or what the function writes to the path that it is given."""
    with replacing(path, argument) as part:
        if isinstance(content, bytes):
            part.write_bytes(content)
        else:
            content(part)


def write_json(path: str | os.PathLike[str], data: Any, *, indent: int = 1, argument: str = "path") -> None:
    """Write JSON by `replacing`."""
    write_whole(path, (json.dumps(data, indent=indent, ensure_ascii=False) + "\n").encode(), argument)


def check_folder(path: object, argument: str = "path") -> Path:
    """The folder. Raises ValueError where there is none, or one that this process may not write to."""
    try:
        named: Any = os.fspath(path)  # type: ignore[call-overload]
    except TypeError:
        named = None
    if not isinstance(named, str) or not named or "\0" in named:
        raise ValueError(f"{argument}={shown(path)} must be the path of a folder, as text")
    folder = Path(named)
    if not folder.is_dir():
        raise ValueError(f"{argument}={named!r} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}={named!r} is a folder that this process may not write to")
    return folder


def nameless(path: str | os.PathLike[str], argument: str = "path") -> int:
    """The descriptor of a new file in a folder, to be read and written, for this process alone and gone with it.

    It has a name, which nobody can have taken, only while it is made: a process that is killed leaves nothing, or if it
    was just then an empty file, which the next call removes. Raises ValueError for no folder to write to.
    """
    folder = check_folder(path, argument)
    remove_stale(folder)
    made = folder / f".kvfold-{os.getpid()}-{secrets.token_hex(8)}.part"
    try:
        file = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ValueError(f"{argument}={os.fspath(path)!r} takes no file: {error.strerror}") from error
    made.unlink(missing_ok=True)  # another process in another container may have thought that we are dead
    return file


def remove_stale(folder: Path) -> int:
    """Remove what killed processes left of `nameless`, and say how many files: regular ones that are ours to remove."""
    removed = 0
    for path in folder.iterdir():
        found = NAMELESS.fullmatch(path.name)
        if found is None or is_alive(int(found[1])):
            continue
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                path.unlink()
                removed += 1
        except FileNotFoundError:  # another start was faster
            continue
    return removed


def is_alive(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # the latter: no process has such a number
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def append(path: Path, data: bytes) -> None:
    """Add bytes to the end of a file in one write, and see that they lie on the disk."""
    check_regular(path)
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def cut_unfinished(path: Path) -> None:
    """Cut off what a killed writer left of a file's last line."""
    check_regular(path)
    if path.exists():
        with path.open("rb+") as file:
            data = file.read()
            file.truncate(data.rfind(b"\n") + 1)


def read_json(
    path: str | os.PathLike[str], here: str, *, limit: int = JSON_LIMIT, constant: Callable[[str], Any] | None = None
) -> Any:
    """What a JSON file holds; `here` names it in errors, `constant` reads NaN and infinities (as in `json.loads`).

    Raises ValueError for what is no regular file, larger than `limit` bytes or no JSON, OSError where it can't be read.
    """
    check_regular(path)
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{here} has more than the {limit} bytes that are read")
    return parse_json(data, here, constant=constant)


def parse_json(text: bytes | str, here: str, *, constant: Callable[[str], Any] | None = None) -> Any:
    """What a JSON text says. Raises ValueError for anything else, whatever Python's reader makes of it."""
    try:
        return json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise ValueError(f"{here} is not JSON: {error}") from None


def check_format(found: object, known: int, here: str) -> None:
    """Raise ValueError unless a file has the number of the format that is read here."""
    if type(found) is not int or found != known:
        raise ValueError(f"{here} was written by format {shown(found)}, this kvfold reads format {known}")
