"""Files: written whole or not at all, with the mode of the umask, over regular files alone; JSON read with limits."""

import json
import os
import socket
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvfold.files import (
    append,
    check_format,
    check_regular,
    cut_unfinished,
    read_json,
    write_folder,
    write_json,
    write_whole,
)  # fmt: skip


@pytest.fixture
def umask():
    """Sets the process's umask; the old one comes back."""
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_whole(path, b"old")

    def half(part):
        part.write_bytes(b"ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_whole(path, half)
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_mode_is_the_umasks_and_that_of_an_old_file_stays(mask, tmp_path, umask):
    umask(mask)
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    write_json(new, {"ü": 1})
    assert mode(new) == 0o666 & ~mask and json.loads(new.read_text(encoding="utf-8")) == {"ü": 1}
    old.touch()
    old.chmod(0o640)
    write_whole(old, b"{}")
    assert mode(old) == 0o640


def test_a_link_goes_on_pointing_where_it_did(tmp_path):
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link", tmp_path / "there" / "file"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        write_whole(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_what_is_no_regular_file_is_refused_and_left(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        cases = {"/dev/null": "a device", "pipe": "a pipe", "folder": "a folder", "link": "a device"}
        for name, kind in {**cases, "socket": "a socket"}.items():
            path = tmp_path / name
            for act in (
                lambda path: write_whole(path, b"x", "out"),
                lambda path: append(path, b"x"),
                cut_unfinished,
                lambda path: read_json(path, "it"),
            ):
                with pytest.raises(ValueError, match=rf"(out|path)='.*{name}' is {kind}, not a regular file"):
                    act(path)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    check_regular(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"out='.*/nowhere/x': there is no folder '.*/nowhere'"):
        write_whole(tmp_path / "nowhere" / "x", b"", "out")


@pytest.mark.parametrize("path", ["", b"x", "a\0b", 1, None], ids=repr)
def test_what_names_no_file(path, tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    for use in (lambda: write_whole(path, b"x"), lambda: read_json(path, "here")):
        with pytest.raises(ValueError, match=r"path=.* must be the path of a file"):
            use()
    assert list(tmp_path.iterdir()) == [] and tmp_path.is_dir()


def test_json_is_read_with_limits(tmp_path):
    path = tmp_path / "x.json"
    texts = {
        "": "is not JSON", "{": "is not JSON", "[" * 100_000: "is not JSON", "9" * 5000: "is not JSON",
        '"' + "a" * 99 + '"': "has more than the 100 bytes that are read",
    }  # fmt: skip
    for text, message in texts.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"this {message}"):
            read_json(path, "this", limit=100 if "100" in message else 1 << 20)
    path.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="this is not JSON"):
        read_json(path, "this")
    path.write_text("[NaN]")
    assert read_json(path, "this", constant=str) == ["NaN"]
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing", "this")


@given(st.one_of(st.none(), st.booleans(), st.floats(), st.text(), st.integers(), st.lists(st.integers())))
def test_another_format_is_named(found):
    if type(found) is int and found == 3:
        check_format(found, 3, "this")
    else:
        with pytest.raises(ValueError, match=r"^this was written by format .*, this kvfold reads format 3$"):
            check_format(found, 3, "this")


def test_a_writer_that_makes_a_file_of_its_own_changes_no_mode(tmp_path):
    def another(part):
        part.unlink()
        part.write_bytes(b"x")
        part.chmod(0o600)

    write_whole(tmp_path / "plain", b"")
    write_whole(tmp_path / "x", another)
    assert mode(tmp_path / "x") == mode(tmp_path / "plain") != 0o600


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    def half(folder) -> None:
        (folder / "a").write_text("x")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "new", half)
    assert not list(tmp_path.iterdir())
    write_folder(tmp_path / "new", lambda folder: (folder / "a").write_text("x"))
    assert [each.name for each in tmp_path.rglob("*")] == ["new", "a"]
    with pytest.raises(ValueError, match=r"path='.*new' is there already"):
        write_folder(tmp_path / "new", half)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_folder(tmp_path / "nowhere/new", half)
