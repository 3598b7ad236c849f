"""Some pages of a table's rows, or some slots, read as rows of their own: nothing is held, and nothing copied."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32
from torch import Tensor

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


class FewSlots(FewPages):
    """Rows of `lengths` of a table's tokens, each of which is a page of its own: `listed` are slots of the pool."""

    def __init__(self, table: TableRows, listed: Int32[np.ndarray, "L M"], lengths: Int32[np.ndarray, " L"]):
        super().__init__(table, listed, lengths)
        self._pool: Any = Singles(table.pool)


class Singles:
    """A pool whose pages are the slots of another's, where they lie. What a page has once can't be read so."""

    page_size = 1

    def __init__(self, pool: Any):
        self.pool, self.device, self.specs, self.arena, self.memory = pool, pool.device, pool.specs, None, None

    @property
    def planes(self) -> Mapping[str, Tensor]:
        """See `PagePool.planes`."""
        return {name: plane.flatten(0, 1)[:, None] for name, plane in self.pool.planes.items()}

    def array(self, name: str) -> np.ndarray:
        """See `PagePool.array`."""
        found: np.ndarray = self.pool.array(name)
        return found
