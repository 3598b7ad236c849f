"""What pages lie in: a tensor for each of the things that a pool stores for its tokens."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from kvfold.pages.memory import blank
from kvfold.pages.runs import stretches

PAGE_SIZE = 16
"""Tokens per page: the last page of a row is half empty on average, 8 tokens of each (row, head)."""
HOST = torch.device("cpu")
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what the CPU kernels read a dtype that NumPy lacks."""


@dataclass(frozen=True)
class Plane:
    """What a pool stores for each token: `width` numbers (None: one scalar), `fill` where nobody says.

    `per_page`: for each page, as the scales of a group of tokens.
    """

    width: int | None
    dtype: torch.dtype
    fill: float = 0.0
    per_page: bool = False

    def shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """(N, P, W), without P where `per_page` and without W where it is a scalar."""
        return (pages, *(() if self.per_page else (page_size,)), *(() if self.width is None else (self.width,)))

    def page_nbytes(self, page_size: int) -> int:
        """Bytes of one page."""
        tokens, width = 1 if self.per_page else page_size, 1 if self.width is None else self.width
        return tokens * width * self.dtype.itemsize


@runtime_checkable
class Memory(Protocol):
    """Where planes lie that are read elsewhere: see `kvfold.pages.FastMemory` and `HostMemory`."""

    def blank(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A plane of zeros."""
        ...

    def resized(self, plane: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The plane with more or fewer entries, where it is; None: it can't be."""
        ...

    def copy(self, made: Tensor, ids: np.ndarray, known: Tensor, origin: np.ndarray) -> None:
        """See `copy_pages`."""
        ...

    def visits(self, planes: Iterable[Tensor], pages: np.ndarray, *, written: bool = False) -> Iterator[slice]:
        """Stretches of a list of pages; each is there until the next is asked for."""
        ...

    def wrote(self, pool: Any, names: Iterable[str], pages: np.ndarray) -> None:
        """Pages of a pool's planes are written where they lie."""
        ...

    def lift(self, x: Tensor) -> Tensor:
        """What was gathered where planes lie, where it is wanted."""
        ...

    def lower(self, x: Tensor) -> Tensor:
        """What is to be written where planes lie, there."""
        ...


class Storage:
    """N pages of P tokens in each plane, in a `memory` that brings them, or (None) in memory."""

    def __init__(
        self, planes: Mapping[str, Plane], device: torch.device, page_size: int, memory: Memory | None = None
    ):  # fmt: skip
        self.specs = dict(planes)
        self.per_page = any(spec.per_page for spec in planes.values())  # whether some plane has one entry for a page
        self.page_size = page_size
        self.device, self.memory = device, memory
        self.planes = {name: self.made(spec, 0) for name, spec in self.specs.items()}
        self._arrays: dict[str, tuple[Tensor, np.ndarray]] = {}

    def array(self, name: str) -> np.ndarray:
        """A plane as the CPU kernels see it, (N * P, W) and no copy; bfloat16 as uint16, float16 as int16."""
        plane = self.planes[name]
        known = self._arrays.get(name)
        if known is None or known[0] is not plane:
            bits = BITS.get(plane.dtype, plane.dtype)
            known = plane, plane.view(bits).view(-1, self.specs[name].width or 1).numpy()
            self._arrays[name] = known
        return known[1]

    def made(
        self, spec: Plane, pages: int, known: Tensor | None = None, *, ids: np.ndarray | None = None,
        origin: np.ndarray | None = None,
    ) -> Tensor:  # fmt: skip
        """A plane of so many pages: `ids` are what `origin` of the `known` ones are (None: the first as they were)."""
        shape = spec.shape(pages, self.page_size)
        memory = self.memory
        made = blank(shape, spec.dtype, self.device) if memory is None else memory.blank(shape, spec.dtype)
        count = 0 if known is None else min(pages, len(known))
        ids, origin = (np.arange(count) if x is None else x for x in (ids, origin))
        if known is not None:
            self._copy(made, ids, known, origin)
        if self.memory is not None and spec.fill == 0.0:  # as a file is where nothing was written
            return made
        # Never read before it is written: lengths bound every read. Filled all the same, because the slack
        # of a page takes part (masked) in dense reads and NaN times zero is NaN.
        rest = np.ones(pages, dtype=bool)
        rest[ids] = False
        for start, length in zip(*stretches(rest), strict=True):
            for some in self._visited((made,), np.arange(start, start + length), written=True):
                made[start : start + length][some] = spec.fill
        return made

    def visits(self, names: Iterable[str], pages: np.ndarray, *, written: bool = False) -> Iterator[slice]:
        """Stretches of a list of pages to be read or written in planes; each before the next is asked for."""
        wanted = list(names)
        if written:
            self.wrote(wanted, pages)
        return self._visited([self.planes[name] for name in wanted], pages, written=written)

    def wrote(self, names: Iterable[str], pages: np.ndarray) -> None:
        """Pages are about to be written in planes, all at once."""
        if self.memory is not None:
            self.memory.wrote(self, names, pages)

    def lifted(self, x: Tensor) -> Tensor:
        """What was gathered from planes, on the device that wants it."""
        return x if self.memory is None else self.memory.lift(x)

    def lowered(self, x: Tensor) -> Tensor:
        """What is to be written to planes, on the device where they lie."""
        return x if self.memory is None else self.memory.lower(x)

    @property
    def home(self) -> torch.device:
        """Where planes lie."""
        return self.device if self.memory is None else HOST

    def _visited(self, planes: Iterable[Tensor], pages: np.ndarray, *, written: bool) -> Iterator[slice]:
        return iter((slice(None),)) if self.memory is None else self.memory.visits(planes, pages, written=written)

    def _copy(self, to: Tensor, ids: np.ndarray, source: Tensor, origin: np.ndarray) -> None:
        """`copy_pages`, where one of the two need not be in memory."""
        if self.memory is None:
            copy_pages(to, ids, source, origin)
        else:
            self.memory.copy(to, ids, source, origin)

    def remake(self, pages: int, ids: np.ndarray | None = None, origin: np.ndarray | None = None) -> None:
        """So many pages from now on: see `made`."""
        if self.memory is not None:  # all or none: a disk may be full
            self.wrote(self.specs, np.arange(0 if ids is None else pages))  # numbered anew they are other pages
            planes = {name: self._resized(name, pages, ids, origin) for name in self.specs}
            self._arrays.clear()
            self.planes.update(planes)
            return
        self._arrays.clear()  # they would hold the old planes
        for name, spec in self.specs.items():
            self.planes[name] = self.made(spec, pages, self.planes[name], ids=ids, origin=origin)

    def _resized(self, name: str, pages: int, ids: np.ndarray | None, origin: np.ndarray | None) -> Tensor:
        """A plane of so many pages, in place where that can be."""
        spec, plane = self.specs[name], self.planes[name]
        if ids is None and self.memory is not None and len(plane):
            grown = self.memory.resized(plane, spec.shape(pages, self.page_size))
            if grown is not None:
                return grown
        return self.made(spec, pages, plane, ids=ids, origin=origin)

    def copy(self, ids: np.ndarray, source: "Storage", origin: np.ndarray) -> None:
        """Our pages `ids` get what pages `origin` of `source` hold; a plane that it lacks gets its fill."""
        self.wrote(self.planes, ids)
        for name, plane in self.planes.items():
            known = source.planes.get(name)
            if known is None:
                here = torch.from_numpy(ids.astype(np.int64)).to(self.home)
                for some in self._visited((plane,), ids, written=True):
                    plane[here[some]] = self.specs[name].fill
            else:
                self._copy(plane, ids, known, origin)


def copy_pages(to: Tensor, ids: np.ndarray, source: Tensor, origin: np.ndarray) -> None:
    """Entries `ids` of a plane get those at `origin` of another: stretch by stretch where that is worth it."""
    cuts = np.flatnonzero((np.diff(ids) != 1) | (np.diff(origin) != 1)) + 1
    if len(cuts) * 4 > len(ids):
        here, there = (torch.from_numpy(x.astype(np.int64)).to(to.device) for x in (ids, origin))
        to[here] = source.index_select(0, there)
        return
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(ids)], strict=True):
        if stop > start:
            first, since = int(ids[start]), int(origin[start])
            to[first : first + stop - start] = source[since : since + stop - start]
