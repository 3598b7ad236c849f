"""Planes that lie on the host: what is written there, and what a device has written and is on its way."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.pages.planes import Planes
from kvfold.pages.pool import PagePool
from kvfold.pages.slots import Slots
from kvfold.pages.storage import copy_pages
from kvfold.pages.transfer import Transfer

AHEAD = 1.25
"""Times what a plane takes that it can grow to in place; then it is copied."""


@dataclass
class Arriving:
    """Tokens that the device has written, and that are on their way to where their pages lie."""

    mark: Any
    pages: Tensor
    offsets: Tensor
    planes: dict[str, Tensor]


class OnHost:
    """What planes lie in: tensors on the host, and the way from `transfer.device` to them."""

    def __init__(self, transfer: Transfer):
        self.transfer = transfer
        self._of: weakref.WeakKeyDictionary[PagePool, Slots] = weakref.WeakKeyDictionary()  # who has copies
        self._pending: weakref.WeakKeyDictionary[PagePool, list[Arriving]] = weakref.WeakKeyDictionary()

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A plane of zeros on the host, with some room behind it."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        with torch.inference_mode(False):  # it is written outside, too
            room = torch.zeros(int(nbytes * AHEAD), dtype=torch.uint8)  # untouched, it takes no memory
            return room[:nbytes].view(dtype).view(tuple(shape))

    def resized(self, plane: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The same plane with more or fewer entries, where it is. None: it has no room there."""
        memory = plane.untyped_storage()
        if not 0 < int(np.prod(shape)) * plane.dtype.itemsize <= memory.nbytes():
            return None
        with torch.inference_mode(False):
            count = int(np.prod(shape)) * plane.dtype.itemsize
            room = torch.empty(0, dtype=torch.uint8).set_(memory)
            return room[:count].view(plane.dtype).view(tuple(shape))

    def copy(self, made: Tensor, ids: np.ndarray, known: Tensor, origin: np.ndarray) -> None:
        """Entries `ids` of a plane get those at `origin` of another."""
        self._arrive()
        copy_pages(made, ids, known, origin)

    def visits(self, planes: Iterable[Tensor], pages: np.ndarray, *, written: bool = False) -> Iterator[slice]:
        """All of a list of pages: they are on the host."""
        self._arrive()
        yield slice(None)

    def wrote(self, pool: PagePool, names: Iterable[str], pages: np.ndarray) -> None:
        """Planes of pages are written on the host: what the device has of them is old."""
        self._arrive()
        some = self._of.get(pool)
        if some is not None and len(pages):
            some.spoil(set(names), some.base(pool) + np.unique(pages))

    def lift(self, x: Tensor) -> Tensor:
        """What was gathered on the host, where it is wanted."""
        return self.transfer.lift(x)

    def lower(self, x: Tensor) -> Tensor:
        """What is to be written on the host."""
        return self.transfer.lower(x)

    def holds(self, table: Planes) -> bool:
        """Whether all of a table's pages can be written on the host at once."""
        self._arrive()
        return True

    def _arrive(self, pool: PagePool | None = None) -> None:
        """What the device has written (of a pool) is on the host from now on."""
        for each in list(self._pending) if pool is None else [pool]:
            for some in self._pending.pop(each, ()):
                self.transfer.finish(some.mark)
                for name, numbers in some.planes.items():
                    each.planes[name][some.pages, some.offsets] = numbers

    @property
    def slow_nbytes(self) -> int:
        """Bytes of the planes on the host."""
        return sum(plane.nbytes for pool in list(self._of) for plane in pool.planes.values())

    @property
    def brought_nbytes(self) -> int:
        """Bytes that were copied to the device."""
        return self.transfer.brought_nbytes

    @property
    def written_nbytes(self) -> int:
        """Bytes that were copied to the host."""
        return self.transfer.written_nbytes

    def check_room(self, nbytes: int) -> None:
        """The host says itself when it has no memory left."""
