"""Some pages of a table's rows that follow each other, read as rows of their own: nothing is held, nothing copied."""

from typing import Any

import numpy as np
from jaxtyping import Int32

from kvfold.pages.planes import Aside
from kvfold.pages.rows import TableRows


class PageStretch(Aside):
    """Pages `first` to `last` of each row, with its holes there.

    They lie in the table's pool, or in another `store`, where `numbers` says.
    """

    def __init__(
        self,
        table: TableRows,
        first: int,
        last: int,
        store: Any = None,
        numbers: Int32[np.ndarray, "R N"] | None = None,
    ):
        size = table.pool.page_size
        start, room = first * size, (last - first) * size
        pages = table.table[:, first:last].copy() if numbers is None else numbers
        lengths = np.clip(table.lengths - start, 0, room).astype(np.int32)
        super().__init__(table.pool if store is None else store, pages, lengths)
        if table.holed:
            known = np.arange(table.holes.shape[1]) < table.hole_count[:, None]
            inside = known & (table.holes >= start) & (table.holes < start + room)
            order = np.argsort(~inside, axis=1, kind="stable")
            self.holes = np.take_along_axis(np.where(inside, table.holes - start, 0), order, 1).astype(np.int32)
            self.hole_count = inside.sum(1).astype(np.int32)
