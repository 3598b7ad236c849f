"""The pool: fixed-size blocks of tokens, who holds them, and the tensors that they are rows of."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

PAGE_SIZE = 16
"""Tokens per page: the last page of a row is half empty on average, 8 tokens of each (row, head)."""
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
class Limit(Protocol):
    """Who says how far pools may grow."""

    def check(self, requests: "Mapping[PagePool, int]") -> None:
        """Raise unless every pool can hand out so many pages; then they lie free in it."""
        ...

    def reserve(self, pages: int, nbytes: int) -> None:
        """Raise unless so many more bytes may be allocated."""
        ...


class PagePool:
    """The storage of one segment: N pages of P tokens in each plane, their reference counts, a free list.

    With an `arena` it is that of many: no table moves its pages.
    """

    def __init__(
        self, planes: Mapping[str, Plane], device: torch.device, page_size: int = PAGE_SIZE, arena: Limit | None = None
    ):
        self.specs = dict(planes)
        self.per_page = any(spec.per_page for spec in planes.values())  # whether some plane has one entry for a page
        self.page_size = page_size
        self.device = device
        self.arena = arena
        self.planes = {name: self._empty(spec, 0) for name, spec in self.specs.items()}
        self.refs = np.zeros(0, dtype=np.int32)
        self.shared = 0  # pages with more than one reference
        self._free: list[int] = []  # a heap: low numbers first, so that an arena finds free pages at the end
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

    def _empty(self, spec: Plane, pages: int) -> Tensor:
        # Never read before it is written: lengths bound every read. Filled all the same, because the slack
        # of a page takes part (masked) in dense reads and NaN times zero is NaN. Under torch.inference_mode() too
        # a tensor that is written outside it later on.
        with torch.inference_mode(False):
            return torch.full(spec.shape(pages, self.page_size), spec.fill, dtype=spec.dtype, device=self.device)

    @property
    def pages(self) -> int:
        """Pages allocated, used or free."""
        return len(self.refs)

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.pages - len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page in every plane, and of its reference count."""
        return sum(spec.page_nbytes(self.page_size) for spec in self.specs.values()) + self.refs.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of every plane and of the reference counts."""
        return sum(plane.nbytes for plane in self.planes.values()) + self.refs.nbytes

    def add_plane(self, name: str, spec: Plane) -> None:
        """A new column beside the others; tokens already stored get its fill value."""
        if name not in self.specs:
            if self.arena is not None:
                self.arena.reserve(self.pages, self.pages * spec.page_nbytes(self.page_size))
            self.specs[name] = spec
            self.planes[name] = self._empty(spec, self.pages)
            self.per_page |= spec.per_page

    def grow(self, pages: int) -> None:
        """Add free pages; page numbers stay valid."""
        if self.arena is not None:
            self.arena.reserve(pages, pages * self.page_nbytes)
        first = self.pages
        self._arrays.clear()  # they would hold the old planes
        for name, spec in self.specs.items():
            more = self._empty(spec, pages)
            with torch.inference_mode(False):
                self.planes[name] = torch.cat([self.planes[name], more]) if first else more
        self.refs = np.concatenate([self.refs, np.zeros(pages, dtype=np.int32)])
        self._free.extend(range(first, first + pages))  # larger than all that are there: still a heap

    def shrink(self) -> None:
        """Give the memory of free pages at the end back; page numbers stay valid."""
        held = np.flatnonzero(self.refs)
        pages = int(held[-1]) + 1 if len(held) else 0
        if pages < self.pages:
            self._arrays.clear()
            for name in self.specs:
                with torch.inference_mode(False):
                    self.planes[name] = self.planes[name][:pages].clone()
            self.refs = self.refs[:pages].copy()
            self._free = [page for page in sorted(self._free) if page < pages]

    def ensure(self, count: int) -> None:
        """`count` free pages: the pool grows by 1/32 when it runs out, in an arena as that says."""
        if count <= self.free:
            return
        if self.arena is not None:
            self.arena.check({self: count})
        else:
            self.grow(max(count - self.free, self.pages // 32))

    def allocate(self, count: int) -> np.ndarray:
        """`count` page numbers with one reference each, the lowest that are free."""
        self.ensure(count)
        if count == self.free:
            chosen, self._free = sorted(self._free), []
        else:
            chosen = [heapq.heappop(self._free) for _ in range(count)]
        ids = np.array(chosen, dtype=np.int32)
        self.refs[ids] = 1
        return ids

    def retain(self, ids: np.ndarray) -> None:
        """One more holder for each of `ids` (a number may occur several times)."""
        np.add.at(self.refs, ids, 1)
        self.shared = int((self.refs > 1).sum())

    def release(self, ids: np.ndarray) -> None:
        """One holder less for each of `ids`; a page that nobody holds is free."""
        np.subtract.at(self.refs, ids, 1)
        self.shared = int((self.refs > 1).sum())
        # No np.unique: it imports on first use, and a table may be finalised in the middle of an import.
        for page in set(ids[self.refs[ids] == 0].tolist()):
            heapq.heappush(self._free, page)

    def empty_like(self) -> "PagePool":
        """A pool of the same planes that holds nothing."""
        return PagePool(self.specs, self.device, self.page_size)
