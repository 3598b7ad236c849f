"""The pool: fixed-size blocks of tokens, who holds them, and the tensors that they are rows of."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PAGE_SIZE = 16
"""Tokens per page: the last page of a row is half empty on average, 8 tokens of each (row, head)."""


@dataclass(frozen=True)
class Plane:
    """What a pool stores for each token: `width` numbers (None: one scalar), `fill` where nobody says."""

    width: int | None
    dtype: torch.dtype
    fill: float = 0.0


class PagePool:
    """The storage of one segment: N pages of P tokens in each plane, their reference counts, a free list."""

    def __init__(self, planes: Mapping[str, Plane], device: torch.device, page_size: int = PAGE_SIZE):
        self.specs = dict(planes)
        self.page_size = page_size
        self.device = device
        self.planes = {name: self._empty(spec, 0) for name, spec in self.specs.items()}
        self.refs = np.zeros(0, dtype=np.int32)
        self.shared = 0  # pages with more than one reference
        self._free: list[int] = []
        self._arrays: dict[str, tuple[Tensor, np.ndarray]] = {}

    def array(self, name: str) -> np.ndarray:
        """A plane as the CPU kernels see it, (N * P, W) and no copy; bfloat16 as uint16, float16 as int16."""
        plane = self.planes[name]
        known = self._arrays.get(name)
        if known is None or known[0] is not plane:
            bits = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}.get(plane.dtype, plane.dtype)
            known = plane, plane.view(bits).view(-1, self.specs[name].width or 1).numpy()
            self._arrays[name] = known
        return known[1]

    def _empty(self, spec: Plane, pages: int) -> Tensor:
        shape = (pages, self.page_size) if spec.width is None else (pages, self.page_size, spec.width)
        # Never read before it is written: lengths bound every read. Filled all the same, because the slack
        # of a page takes part (masked) in dense reads and NaN times zero is NaN.
        return torch.full(shape, spec.fill, dtype=spec.dtype, device=self.device)

    @property
    def pages(self) -> int:
        """Pages allocated, used or free."""
        return len(self.refs)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.pages - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of every plane and of the reference counts."""
        return sum(plane.nbytes for plane in self.planes.values()) + self.refs.nbytes

    def add_plane(self, name: str, spec: Plane) -> None:
        """A new column beside the others; tokens already stored get its fill value."""
        if name not in self.specs:
            self.specs[name] = spec
            self.planes[name] = self._empty(spec, self.pages)

    def grow(self, pages: int) -> None:
        """Add free pages; page numbers stay valid."""
        first = self.pages
        self._arrays.clear()  # they would hold the old planes
        for name, spec in self.specs.items():
            more = self._empty(spec, pages)
            self.planes[name] = torch.cat([self.planes[name], more]) if first else more
        self.refs = np.concatenate([self.refs, np.zeros(pages, dtype=np.int32)])
        self._free.extend(range(first + pages - 1, first - 1, -1))

    def allocate(self, count: int) -> np.ndarray:
        """`count` page numbers with one reference each; the pool grows by 1/32 when it runs out."""
        missing = count - len(self._free)
        if missing > 0:
            self.grow(max(missing, self.pages // 32))
        ids = np.array([self._free.pop() for _ in range(count)], dtype=np.int32)
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
        self._free.extend(sorted(set(ids[self.refs[ids] == 0].tolist()), reverse=True))

    def empty_like(self) -> "PagePool":
        """A pool of the same planes that holds nothing."""
        return PagePool(self.specs, self.device, self.page_size)
