"""What segments on pages have in common, whatever their planes mean."""

import numpy as np
from torch import Tensor

from kvfold.pages import PagePool, PageTable


class PagedSegment:
    """Tokens on pages, one row of the page table for each (sequence, KV head)."""

    def __init__(self, table: PageTable, heads: int):
        self.table = table
        self.heads = heads

    @property
    def pool(self) -> PagePool:
        return self.table.pool

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes + self.table.nbytes

    def bytes_beside(self, counted):
        pool = 0 if id(self.pool) in counted else self.pool.nbytes
        counted.add(id(self.pool))
        return self.nbytes - self.pool.nbytes + pool

    def row_nbytes(self):
        return self.counts().sum(1)

    def lengths(self):
        return self.table.lengths.reshape(-1, self.heads)

    def columns(self):
        d = self.dense()
        return d.valid, d.columns

    def cropped(self, limit):
        pass

    def drop_tokens(self):
        self.clear()

    @property
    def shared(self):
        return self.table.shared

    def same_pages(self, other):
        return False

    def reserve(self):
        return []

    def replayed(self):
        self.table.step()

    def join(self, other):
        raise NotImplementedError

    def amend(self, slots, keys, values):
        raise NotImplementedError

    def step(self, q, k, v, positions, scale, *, weights):
        raise NotImplementedError

    def state(self, *, of=None):
        raise NotImplementedError

    @property
    def longest(self) -> int:
        return self.table.longest

    def counts(self) -> np.ndarray:
        return self.table.counts.reshape(-1, self.heads)

    def _rows(self, plane: Tensor) -> Tensor:
        return plane.reshape(len(plane) // self.heads, self.heads, *plane.shape[1:])

    def _table_of(self, rows: np.ndarray) -> PageTable:
        """The table of some sequences, over the same pages."""
        wide = (np.asarray(rows)[:, None] * self.heads + np.arange(self.heads)).reshape(-1)
        return self.table.select(wide)

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        self.table.cut(counts.reshape(-1))
        self.table.trim(slack=slack)

    def clear(self) -> None:
        # To a pool of our own: in the one that a fork shares, our next tokens would lie in the other's memory for good.
        self.table.restart()

    def compact(self) -> None:
        self.table.compact()
