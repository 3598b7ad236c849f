"""Some pages of a table's rows, read as rows of their own: nothing is held, and nothing copied."""

import numpy as np
from jaxtyping import Int32

from kvfold.pages.planes import Planes
from kvfold.pages.rows import TableRows


class FewPages(Planes):
    """Rows of `lengths` slots on `listed` pages of a table's pool, some of those that its rows hold.

    To be read before the table's next write; kernels take it for a table of shorter rows. Raises ValueError where the
    table has holes, whose slots would not be known here.
    """

    def __init__(self, table: TableRows, listed: Int32[np.ndarray, "L M"], lengths: Int32[np.ndarray, " L"]):
        if table.holed:
            raise ValueError("table has holes; its rows must be closed before some of their pages are listed")
        # No pool knows of it, and nothing is let go of when it goes.
        self._pool, self.scattered, self.regular = table.pool, True, False
        self.table, self.lengths = listed, lengths
        self.fill_holes()
        self._room, self._known, self._sent = 0, [None] * 4, [None] * 4

    def __del__(self) -> None:
        return
