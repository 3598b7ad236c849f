"""Some pages of a table's rows, read as rows of their own: nothing is held, and nothing copied."""

import numpy as np
from jaxtyping import Bool

from kvfold.pages.planes import Planes
from kvfold.pages.rows import TableRows


class FewPages(Planes):
    """For each row of a table some lists of its pages, side by side: row `r * S + s` has those of list s.

    To be read before the table's next write; kernels take it for a table of shorter rows. Raises ValueError where the
    table has holes, whose slots would not be known here.
    """

    def __init__(self, table: TableRows, chosen: Bool[np.ndarray, "R S M"]):
        if table.holed:
            raise ValueError("table has holes; its rows must be closed before some of their pages are listed")
        size, (rows, lists, _) = table.pool.page_size, chosen.shape
        held = chosen[..., : table.table.shape[1]].reshape(rows * lists, -1)
        held = held & (np.arange(held.shape[1]) < np.repeat(table.needed, lists)[:, None])
        counts = held.sum(1)
        at, place = held.nonzero()
        listed = np.full((rows * lists, int(counts.max(initial=0))), -1, dtype=np.int32)
        listed[at, np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)] = table.table[at // lists, place]
        lengths = np.repeat(table.lengths, lists)
        last = np.zeros(len(held), dtype=bool)
        if held.shape[1]:
            last = held[np.arange(len(held)), np.maximum(-(-lengths // size) - 1, 0)]
        # No pool knows of it, and nothing is let go of when it goes.
        self._pool, self.scattered, self.regular = table.pool, True, False
        self.table = listed
        self.lengths = (counts * size - np.where(last, -lengths % size, 0)).astype(np.int32)
        self.fill_holes()
        self._room, self._known, self._sent = 0, [None] * 4, [None] * 4

    def __del__(self) -> None:
        return
