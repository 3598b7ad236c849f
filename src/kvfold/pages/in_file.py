"""Planes that lie in a file: tensors over its mapping, which grow where they are, and the blocks that they lie on."""

import ctypes
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.pages.pool import PagePool
from kvfold.pages.residency import NONE, Blocks, Residency
from kvfold.pages.spill import UNIT, Range, SpillFile

ROOM = 2
"""Times what a plane takes that it can grow to in place; then it is copied."""


class InFile:
    """What planes lie in: a file, whose blocks `residency` knows by their numbers."""

    def __init__(self, file: SpillFile, residency: Residency):
        self.file, self.residency = file, residency
        self._ranges: dict[int, Range] = {}  # by the address of the plane
        self._memory: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # of ranges, while in use
        self._gone, self._busy = list[Range](), False

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A plane of zeros, none of it in memory. Raises SpillFull."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if not nbytes:
            return torch.empty(tuple(shape), dtype=dtype)
        made = self.file.take(nbytes, ROOM * nbytes)
        memory = (ctypes.c_char * made.room).from_address(made.address)
        self._ranges[made.address], self._memory[made.address] = made, memory
        # The range is nobody's when the last tensor over its memory goes; at the process's end it simply ends.
        weakref.finalize(memory, self._free, made).atexit = False
        return over(memory, shape, dtype)

    def resized(self, plane: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The same plane with more or fewer entries, where it is. None: it has no room there. Raises SpillFull."""
        nbytes, some = int(np.prod(shape)) * plane.dtype.itemsize, self._ranges.get(plane.data_ptr())
        if some is None or not 0 < nbytes <= some.room:
            return None
        before = some.nbytes
        self.file.resize(some, nbytes)
        self._forget(some.start + some.nbytes, before - some.nbytes)
        return over(self._memory[some.address], shape, plane.dtype)

    def _free(self, some: Range) -> None:
        self._gone.append(some)
        if not self._busy:
            self._give_back()

    def _give_back(self) -> None:
        while self._gone:
            some = self._gone.pop()
            self._ranges.pop(some.address, None)
            self._forget(some.start, some.nbytes)
            self.file.give_back(some)

    @contextmanager
    def _undisturbed(self) -> Iterator[Residency]:
        """Within the block ranges that are let go of wait: Python may collect what held them at any moment."""
        self._busy = True
        try:
            yield self.residency
        finally:
            self._busy = False
            self._give_back()

    def _forget(self, start: int, nbytes: int) -> None:
        if nbytes > 0:
            self.residency.forget(np.arange(start // UNIT, (start + nbytes) // UNIT))

    def blocks(self, plane: Tensor, pages: Int[np.ndarray, " _"]) -> Blocks:
        """The blocks that pages of a plane lie on, each once; none of what is not here."""
        some = self._ranges.get(plane.data_ptr()) if len(plane) else None
        if some is None or not len(pages):
            return NONE
        size = plane.nbytes // len(plane)
        marks = np.zeros(some.nbytes // UNIT, dtype=bool)
        first, last = pages.astype(np.int64) * size // UNIT, ((pages.astype(np.int64) + 1) * size - 1) // UNIT
        for step in range(int((last - first).max()) + 1):
            marks[np.minimum(first + step, last)] = True
        return np.flatnonzero(marks) + some.start // UNIT

    def _own(self, pool: PagePool) -> Iterator[Blocks]:
        """The blocks of each plane of a pool."""
        for plane in pool.planes.values():
            some = self._ranges.get(plane.data_ptr()) if len(plane) else None
            if some is not None:
                yield np.arange(some.nbytes // UNIT) + some.start // UNIT

    def wrote(self, pool: PagePool, names: Iterable[str], pages: np.ndarray) -> None:
        """What is written in memory is written in the file."""

    def lift(self, x: Tensor) -> Tensor:
        """What was gathered is in memory."""
        return x

    def lower(self, x: Tensor) -> Tensor:
        """What is to be written is in memory."""
        return x

    @property
    def slow_nbytes(self) -> int:
        """Bytes on disk."""
        return self.file.nbytes

    @property
    def hits(self) -> int:
        """Blocks that were in memory when they were read or written."""
        return self.residency.hits

    @property
    def misses(self) -> int:
        """Those that were not."""
        return self.residency.misses

    @property
    def brought_nbytes(self) -> int:
        """Bytes that were read from the disk."""
        return self.residency.brought_nbytes

    @property
    def written_nbytes(self) -> int:
        """Bytes that were written there."""
        return self.residency.written_nbytes

    def check_room(self, nbytes: int) -> None:
        """Raise SpillFull unless the disk has room for so many bytes more."""
        self.file.check_room(nbytes)


def over(memory: Any, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor over memory that is there while it is. Under torch.inference_mode() too one that is written later on."""
    count = int(np.prod(shape)) * dtype.itemsize
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, count=count).view(dtype).view(tuple(shape))
