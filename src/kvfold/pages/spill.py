"""A file that is mapped into memory: ranges of it, on disk before anybody writes there.

What is mapped is the process's only while it is used: a range that is let go is the file's again, and what was written
goes to the disk when the system likes.
"""

import ctypes
import errno
import os
import weakref
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvfold.pages.ranges import Ranges

UNIT = 1 << 16
"""Bytes: ranges begin and end at multiples of it. As many the system maps around a page that is read."""
VAST = 1 << 40
"""Bytes of addresses that are taken for a file, which take no memory; fewer where a process may not have them."""
LEAST = 1 << 32
PROT, MAP_SHARED, MAP_NORESERVE, FAILED = 3, 0x01, 0x4000, ctypes.c_void_p(-1).value
WILLNEED, DONTNEED = 3, 4
PUNCH_HOLE, WRITE_OUT = 3, 2


class SpillFull(OSError):
    """The disk has no room for `needed` bytes more in folder `spill`; about `free` are there. Nothing has changed."""

    def __init__(self, spill: str, needed: int, free: int, reason: int):
        text = f"spill={spill!r} has no room for {needed} bytes more ({free} are free): {os.strerror(reason)}"
        super().__init__(reason, text)
        self.needed, self.free = needed, free

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(eq=False)
class Range:
    """A stretch of the file: `room` bytes from `start` that are nobody else's, `nbytes` of them on disk."""

    start: int
    room: int
    address: int
    nbytes: int = 0


class SpillFile:
    """Ranges of a file that are allocated on disk before they are used. Freed ones read as zeros.

    `file`: the descriptor of one that is empty, and this object's from now on; `folder`: where it is, for errors.
    Raises OSError where the process may not have the addresses.
    """

    def __init__(self, file: int, folder: str):
        self.file, self.folder, self.nbytes = file, folder, 0  # bytes on disk
        try:
            self.address, self.room = mapped(file)
        except BaseException:
            os.close(file)
            raise
        self._ranges = Ranges()
        weakref.finalize(self, closed, file, self.address, self.room).atexit = False

    def take(self, nbytes: int, room: int) -> Range:
        """A range of zeros, `nbytes` on disk, that can grow in place up to `room`. Raises SpillFull."""
        room = -(-max(room, nbytes) // UNIT) * UNIT
        start = self._ranges.find(room)
        if start + room > self.room:
            raise SpillFull(self.folder, room, self.room - start, errno.ENOMEM)
        made = Range(start, room, self.address + start)
        self.resize(made, nbytes)  # which may fail, and then nothing is taken
        self._ranges.take(room)
        return made

    def resize(self, some: Range, nbytes: int) -> None:
        """So many bytes of a range are on disk from now on, at most its `room`. Raises SpillFull, changing nothing."""
        whole = -(-nbytes // UNIT) * UNIT
        if whole > some.nbytes:
            self._allocate(some.start + some.nbytes, whole - some.nbytes)
        elif whole < some.nbytes:
            self._punch(some.start + whole, some.nbytes - whole)
        self.nbytes += whole - some.nbytes
        some.nbytes = whole

    def give_back(self, some: Range) -> None:
        """The range is nobody's: its part of the disk is free."""
        self.resize(some, 0)
        self._ranges.give_back(some.start, some.room)

    def check_room(self, nbytes: int) -> None:
        """Raise SpillFull unless the disk has room for so many bytes now: they are allocated, and given back."""
        if nbytes > 0:
            start = self.room - -(-nbytes // UNIT) * UNIT
            if start < self._ranges.top:
                raise SpillFull(self.folder, nbytes, self.room - self._ranges.top, errno.ENOMEM)
            self._allocate(self._ranges.top, nbytes)
            self._punch(self._ranges.top, nbytes)

    def let_go(self, start: int, nbytes: int) -> None:
        """The process holds these bytes no more; what was written of them is the file's."""
        call("madvise", self.address + start, nbytes, DONTNEED)

    def write_out(self, start: int, nbytes: int) -> None:
        """The system is asked to bring what the process let go of to the disk, while we do something else."""
        call("sync_file_range", self.file, start, nbytes, WRITE_OUT)

    def expect(self, start: int, nbytes: int) -> None:
        """These bytes are read soon: the system reads them from the disk meanwhile, into memory that is not ours."""
        call("madvise", self.address + start, nbytes, WILLNEED)

    def _allocate(self, start: int, nbytes: int) -> None:
        try:
            os.posix_fallocate(self.file, start, nbytes)
        except OSError as error:
            self._punch(start, nbytes)  # it may have got a part
            disk = os.statvfs(self.folder)
            raise SpillFull(self.folder, nbytes, disk.f_bavail * disk.f_frsize, error.errno or errno.EIO) from error

    def _punch(self, start: int, nbytes: int) -> None:
        """These bytes are zeros, and take no room. Where the file system can't do that they are written as zeros."""
        if call("fallocate", self.file, PUNCH_HOLE, start, nbytes) == 0 or start >= os.fstat(self.file).st_size:
            return
        zeros = bytes(UNIT)
        for at in range(start, min(start + nbytes, os.fstat(self.file).st_size), UNIT):
            os.pwrite(self.file, zeros[: min(UNIT, start + nbytes - at)], at)


def mapped(file: int) -> tuple[int, int]:
    """Where the bytes of a file lie in memory, and how many of them: what lies behind its end comes when it grows."""
    size = VAST
    while size >= LEAST:
        address = function("mmap")(None, size, PROT, MAP_SHARED | MAP_NORESERVE, file, 0)
        if address != FAILED:
            return address, size
        size //= 4
    raise OSError(errno.ENOMEM, "the file of a spill can't be mapped: this process may not have so many addresses")


KINDS: dict[str, tuple[Any, ...]] = {
    "mmap": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64),
    "munmap": (ctypes.c_void_p, ctypes.c_size_t),
    "madvise": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    "fallocate": (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "sync_file_range": (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint),
}


@cache
def function(name: str) -> Any:
    """One of the C library's, which Python has not or not so."""
    found = getattr(ctypes.CDLL(None, use_errno=True), name)
    found.argtypes, found.restype = KINDS[name], ctypes.c_void_p if name == "mmap" else ctypes.c_int
    return found


def call(name: str, *given: int) -> int:
    """What it returns; -1 is a refusal, which changes nothing here: it was advice, or the caller looks."""
    result: int = function(name)(*given)
    return result


def closed(file: int, address: int, length: int) -> None:
    """Nobody has the file any more: its disk is free, and its addresses."""
    function("munmap")(address, length)
    os.close(file)
