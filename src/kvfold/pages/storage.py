"""What pages lie in: a tensor for each of the things that a pool stores for its tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold.pages.memory import blank
from kvfold.pages.runs import stretches

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


class Storage:
    """N pages of P tokens in each plane."""

    def __init__(self, planes: Mapping[str, Plane], device: torch.device, page_size: int):
        self.specs = dict(planes)
        self.per_page = any(spec.per_page for spec in planes.values())  # whether some plane has one entry for a page
        self.page_size = page_size
        self.device = device
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
        made = blank(spec.shape(pages, self.page_size), spec.dtype, self.device)
        count = 0 if known is None else min(pages, len(known))
        ids, origin = (np.arange(count) if x is None else x for x in (ids, origin))
        if known is not None:
            copy_pages(made, ids, known, origin)
        # Never read before it is written: lengths bound every read. Filled all the same, because the slack
        # of a page takes part (masked) in dense reads and NaN times zero is NaN.
        rest = np.ones(pages, dtype=bool)
        rest[ids] = False
        for start, length in zip(*stretches(rest), strict=True):
            made[start : start + length] = spec.fill
        return made

    def remake(self, pages: int, ids: np.ndarray | None = None, origin: np.ndarray | None = None) -> None:
        """So many pages from now on: see `made`."""
        self._arrays.clear()  # they would hold the old planes
        for name, spec in self.specs.items():
            self.planes[name] = self.made(spec, pages, self.planes[name], ids=ids, origin=origin)

    def copy(self, ids: np.ndarray, source: "Storage", origin: np.ndarray) -> None:
        """Our pages `ids` get what pages `origin` of `source` hold; a plane that it lacks gets its fill."""
        for name, plane in self.planes.items():
            known = source.planes.get(name)
            if known is None:
                plane[torch.from_numpy(ids.astype(np.int64)).to(self.device)] = self.specs[name].fill
            else:
                copy_pages(plane, ids, known, origin)


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
