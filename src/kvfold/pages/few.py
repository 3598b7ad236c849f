"""Some pages of a table's rows, read as rows of their own: nothing is held, and nothing copied."""

import numpy as np
from jaxtyping import Int

from kvfold.pages.planes import Planes
from kvfold.pages.rows import TableRows


class FewPages(Planes):
    """For each row of a table some lists of its pages, side by side: row `r * S + s` has those of list s.

    A list has the places of pages in their row, ascending; what is no place of a page there stands for nothing. To be
    read before the table's next write; kernels take it for a table of shorter rows. Raises ValueError where the table
    has holes, whose slots would not be known here.
    """

    def __init__(self, table: TableRows, places: Int[np.ndarray, "R S K"]):
        if table.holed:
            raise ValueError("table has holes; its rows must be closed before some of their pages are listed")
        size, needed = table.pool.page_size, table.needed[:, None, None]
        held = (places >= 0) & (places < needed)
        counts, whole = held.sum(-1), (held & (places == needed - 1)).any(-1)
        row, _, _ = at = held.nonzero()
        listed = np.full((*counts.shape, int(counts.max(initial=0))), -1, dtype=np.int32)
        listed[np.arange(listed.shape[2]) < counts[..., None]] = table.table[row, places[at]]
        # No pool knows of it, and nothing is let go of when it goes.
        self._pool, self.scattered, self.regular = table.pool, True, False
        self.table = listed.reshape(counts.size, -1)
        slack = np.where(whole, (-table.lengths % size)[:, None], 0)  # of a row's last page
        self.lengths = (counts * size - slack).astype(np.int32).reshape(-1)
        self.fill_holes()
        self._room, self._known, self._sent = 0, [None] * 4, [None] * 4

    def __del__(self) -> None:
        return
