"""Some pages of a table's rows, or some slots, read as rows of their own: nothing is held, and nothing copied."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32
from torch import Tensor

from kvfold.pages.planes import Aside, Planes
from kvfold.pages.rows import TableRows


class FewPages(Aside):
    """Rows of `lengths` slots on `listed` pages of a table's pool, some of those that its rows hold.

    Raises ValueError where the table has holes, whose slots would not be known here.
    """

    def __init__(self, table: TableRows, listed: Int32[np.ndarray, "L M"], lengths: Int32[np.ndarray, " L"]):
        if table.holed:
            raise ValueError("table has holes; its rows must be closed before some of their pages are listed")
        super().__init__(table.pool, listed, lengths)


class FewSlots(FewPages):
    """Rows of `lengths` of a table's tokens, each of which is a page of its own: `listed` are slots of the pool."""

    def __init__(self, table: TableRows, listed: Int32[np.ndarray, "L M"], lengths: Int32[np.ndarray, " L"]):
        super().__init__(table, listed, lengths)
        self._pool: Any = Singles(table.pool)


class ReadPages(Aside):
    """The pages of each row on which `read` marks a slot with a token, as rows of their own; `marks`: those slots."""

    def __init__(self, table: Planes, read: Bool[np.ndarray, "R T"]):
        size, pages, rows = table.pool.page_size, table.table.shape[1], len(table.table)
        marks: np.ndarray = np.zeros((rows, pages * size), dtype=bool)
        marks[:, : read.shape[1]] = read
        for row, count in enumerate(table.hole_count.tolist() if table.holed else ()):
            marks[row, table.holes[row, :count]] = False
        marks &= np.arange(pages * size) < table.lengths[:, None]
        wide = marks.reshape(rows, pages, size)
        asked = wide.any(2)
        most = int(asked.sum(1).max(initial=0))
        order = np.argsort(~asked, axis=1, kind="stable")[:, :most]  # those in front, and in their order
        mine = np.take_along_axis(asked, order, 1)
        filled = np.clip(table.lengths[:, None] - order * size, 0, size) * mine  # the row's last page comes last, too
        listed = np.where(mine, np.take_along_axis(table.table, order, 1), -1).astype(np.int32)
        super().__init__(table.pool, listed, filled.sum(1).astype(np.int32))
        some = np.take_along_axis(wide, order[..., None], 1).reshape(rows, most * size)
        self.marks: np.ndarray = some[:, : self.longest]


class Singles:
    """A pool whose pages are the slots of another's, where they lie. What a page has once can't be read so."""

    page_size = 1

    def __init__(self, pool: Any):
        self.pool, self.device, self.specs, self.arena, self.memory = pool, pool.device, pool.specs, None, None

    @property
    def planes(self) -> Mapping[str, Tensor]:
        """See `PagePool.planes`."""
        return {name: plane.flatten(0, 1)[:, None] for name, plane in self.pool.planes.items()}

    def lifted(self, x: Tensor) -> Tensor:
        """See `Storage.lifted`: it lies where it is read."""
        return x

    def array(self, name: str) -> np.ndarray:
        """See `PagePool.array`."""
        found: np.ndarray = self.pool.array(name)
        return found
