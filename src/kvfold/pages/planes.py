"""What lies on the pages that rows hold: planes read and written as dense tensors, or slot by slot."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.pages.rows import TableRows, spans


class Planes(TableRows):
    """Rows, and the tensors of their tokens. What is written here belongs to the writer alone (see `writable`)."""

    def valid(self) -> Bool[Tensor, "R T"]:
        """Which slots of a dense read are tokens."""
        lengths = torch.tensor(self.lengths, device=self.pool.device, dtype=torch.int64)
        valid = torch.arange(self.longest, device=self.pool.device) < lengths[:, None]
        if self.holed:
            rows, slots = spans(np.zeros_like(self.hole_count), self.hole_count)
            holes = torch.from_numpy(np.stack([rows, self.holes[rows, slots]]).astype(np.int64)).to(valid.device)
            valid[holes[0], holes[1]] = False
        return valid

    def dense(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A plane as (R, T, ...), from slot `start` to `stop`, or to the longest row's end.

        A view where pages lie side by side, else a gather.
        """
        stop, size = self.longest if stop is None else min(stop, self.longest), self.pool.page_size
        if self.regular:
            return self.block(name)[:, start:stop]
        first = start // size
        wide = self.paged(name, first, -(-stop // size)).flatten(1, 2)
        return wide[:, start - first * size : stop - first * size]

    def paged(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """A plane page by page, (R, M, P, ...), or (R, M, ...) of what a page has once; anything where none is."""
        plane, last = self.pool.planes[name], self.table.shape[1] if last is None else last
        if self.regular:
            return plane[: self.table.size].view(*self.table.shape, *plane.shape[1:])[:, first:last]
        held = np.maximum(self.table[:, first:last], 0)
        ids = torch.from_numpy(held.reshape(-1)).to(plane.device)
        found = [plane.index_select(0, ids[some]) for some in self._visits((name,), ids)]
        return self.pool.lifted(_joined(found)).view(*held.shape, *plane.shape[1:])

    def block(self, name: str) -> Tensor:
        """A plane of a regular table as (R, M * P, ...), to read or to write in place."""
        plane, per_row = self.pool.planes[name], self.table.shape[1]
        return plane[: self.rows * per_row].view(self.rows, per_row * self.pool.page_size, *plane.shape[2:])

    def read(self, names: Iterable[str], rows: np.ndarray, slots: np.ndarray) -> dict[str, Tensor]:
        """What planes hold at slots of rows, (N, ...) each."""
        pages, offsets = self._at(rows, slots)
        return self._gathered(names, pages, offsets)

    def flat(self) -> dict[str, Tensor]:
        """Every plane without gaps, row by row, as `PageTable.add` takes them: (N, ...), holes included."""
        return self._gathered(self.pool.planes, *self._at(*self.spans()))

    def _gathered(self, names: Iterable[str], pages: Tensor, offsets: Tensor) -> dict[str, Tensor]:
        """What planes hold at offsets of pages, (N, ...); what a page has once, where its first token is asked for."""
        wanted = list(names)
        found: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for some in self._visits(wanted, pages):
            here, at = pages[some], offsets[some]
            for name in wanted:
                plane, once = self.pool.planes[name], self.pool.specs[name].per_page
                found[name].append(plane[here[at == 0]] if once else plane[here, at])
        return {name: self.pool.lifted(_joined(parts)) for name, parts in found.items()}

    def _visits(self, names: Iterable[str], pages: Tensor, *, written: bool = False) -> Iterator[slice]:
        """See `Storage.visits`; of an empty list one, too."""
        if self.pool.memory is None or not len(pages):
            return iter((slice(None),))
        return self.pool.visits(names, pages.numpy(), written=written)

    def put(self, planes: Mapping[str, Tensor], start: int, stop: np.ndarray) -> None:
        """Write `planes` (R, T, ...) over the slots from `start` to `stop[r]` of row r; no page may be shared."""
        if not planes or self.regular:
            for name, new in planes.items():
                place = self.block(name)[:, start : start + new.shape[1]]
                if new.data_ptr() != place.data_ptr():  # a view of these very pages has nothing to write
                    place.copy_(new)
            return
        rows, slots = spans(np.full(self.rows, start), np.maximum(stop - start, 0))
        source = self._index(rows), self._index(slots - start)
        self._scatter(*self._at(rows, slots), {name: new[source] for name, new in planes.items()})

    def _scatter(self, pages: Tensor, offsets: Tensor, planes: Mapping[str, Tensor]) -> None:
        """Write `planes` (N, ...) at offsets of pages."""
        for some in self._visits(planes, pages, written=True):
            for name, new in planes.items():
                plane = self.pool.planes[name]
                plane[pages[some], offsets[some]] = self.pool.lowered(new[some].to(plane.dtype))

    def _at(self, rows: np.ndarray, slots: np.ndarray) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Page and offset of slots."""
        pages, offsets = self.table[rows, slots // self.pool.page_size], slots % self.pool.page_size
        return self._index(pages), self._index(offsets)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.pool.home)


class Aside(Planes):
    """Rows over pages of somebody else's, to be read before their next write: nothing is held, and nothing let go of.

    Kernels take it for a table. `pool` is what the pages lie in.
    """

    def __init__(self, pool: Any, table: Int[np.ndarray, "R M"], lengths: Int[np.ndarray, " R"]):
        self._pool, self.scattered, self.regular = pool, True, False
        self.table, self.lengths = table, lengths
        self.fill_holes()
        self._room, self._known, self._sent = 0, [None] * 4, [None] * 4

    def __del__(self) -> None:  # no pool knows of it
        return


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
