"""Dense: keys and values as they are, in the model's dtype or a narrower one, on pages."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold import ops
from kvfold.formats.segment import LOG_MASS, POSITION, Chunk
from kvfold.pages import PAGE_SIZE, PagePool, PageTable, Plane
from kvfold.rotation import Compact


@dataclass(frozen=True)
class Dense:
    """Keys and values unchanged (`dtype=None`) or rounded to `dtype`; addressable token by token, exact to crop."""

    dtype: torch.dtype | None = None
    page_size: int = PAGE_SIZE

    def segment(self, chunk: Chunk) -> "DenseSegment":
        dtype = self.dtype or chunk.keys.dtype
        planes = {
            "keys": Plane(chunk.keys.shape[-1], dtype),
            "values": Plane(chunk.values.shape[-1], dtype),
            POSITION: Plane(None, torch.int32),
        }
        rows = chunk.keys.shape[0] * chunk.keys.shape[1]
        table = PageTable(PagePool(planes, chunk.keys.device, self.page_size), rows)
        return DenseSegment(table, heads=chunk.keys.shape[1], compute=chunk.keys.dtype)


class DenseSegment:
    """Tokens on pages, one row of the page table for each (sequence, KV head)."""

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype):
        self.table = table
        self.heads = heads
        self.compute = compute

    @property
    def pool(self) -> PagePool:
        return self.table.pool

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes + self.table.nbytes

    @property
    def longest(self) -> int:
        return self.table.longest

    def counts(self) -> np.ndarray:
        return self.table.lengths.reshape(-1, self.heads)

    def _rows(self, plane: Tensor) -> Tensor:
        return plane.reshape(len(plane) // self.heads, self.heads, *plane.shape[1:])

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._rows(self.table.dense("keys")), self._rows(self.table.dense("values"))
        if compact is not None:
            keys = compact.rotate_keys(keys, self._rows(self.table.dense(POSITION)))
        keys, values = keys.to(q.dtype), values.to(q.dtype)
        (b, h, g, n, d), dv = q.shape, values.shape[-1]
        # The heads of a group, and all their queries, read the same keys: one block of G * Q queries per KV head.
        out, lse = ops.attend(q.reshape(b, h, g * n, d), keys, values, scale, self._bias(read))
        return out.view(b, h, g, n, dv), lse.view(b, h, g, n)

    def _bias(self, read: Tensor | None) -> Tensor | None:
        """What is added to every logit: the log-mass of a slot, -inf for a slot that is empty or not read."""
        mass = self._rows(self.table.dense(LOG_MASS)) if LOG_MASS in self.pool.planes else None
        if self.table.even and read is None:
            return None if mass is None else mass[:, :, None]
        seen = self._rows(self.table.valid())
        seen = seen if read is None else seen & read
        return torch.where(seen, torch.zeros((), device=seen.device) if mass is None else mass, -torch.inf)[:, :, None]

    def dense(self) -> Chunk:
        columns = {n: self._rows(self.table.dense(n)) for n in self.pool.planes if n not in ("keys", "values")}
        return Chunk(
            self._rows(self.table.dense("keys")).to(self.compute),
            self._rows(self.table.dense("values")).to(self.compute),
            self._rows(self.table.valid()),
            columns,
        )

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        self._add_columns(chunk.columns)
        planes = {"keys": chunk.keys, "values": chunk.values, **chunk.columns}
        place = self.table.tail(chunk.keys.shape[2]) if even else None
        if place is not None:
            for name in self.pool.planes:
                block = self.table.block(name)[:, place]
                block.copy_(planes[name].flatten(0, 1)) if name in planes else block.fill_(self.pool.specs[name].fill)
            return
        valid = chunk.valid.flatten(0, 1)
        pages, offsets = self.table.slots(valid.sum(1).cpu().numpy())
        for name, plane in self.pool.planes.items():
            new = planes[name].flatten(0, 1)[valid] if name in planes else self.pool.specs[name].fill
            plane[pages, offsets] = new.to(plane.dtype) if isinstance(new, Tensor) else new

    def _add_columns(self, columns: Mapping[str, Tensor]) -> None:
        for name, column in columns.items():
            self.pool.add_plane(name, Plane(None, column.dtype))

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor]) -> None:
        self._add_columns(columns)
        mask = mask.flatten(0, 1)
        counts = mask.sum(1)
        longest = int(counts.max()) if len(counts) else 0
        order = torch.argsort((~mask).byte(), dim=1, stable=True)[:, :longest]  # the kept ones first, in order
        kept = {}
        for name in self.pool.planes:
            dense = columns[name].flatten(0, 1) if name in columns else self.table.dense(name)
            kept[name] = dense.gather(
                1, order.view(*order.shape, *[1] * (dense.dim() - 2)).expand(-1, -1, *dense.shape[2:])
            )
        if self.pool.shared or not self.table.regular:
            self._rebuild(kept, counts)
            return
        for name, plane in self.pool.planes.items():
            self.table.block(name)[:, :longest] = kept[name].to(plane.dtype)
        before = self.table.longest
        self.table.lengths = counts.cpu().numpy().astype(np.int32)
        # One token out for one in happens at every decode step: only a real drop is worth moving for.
        if before - longest >= self.pool.page_size or not self.table.even:
            self.table.trim()

    def _rebuild(self, kept: Mapping[str, Tensor], counts: Tensor) -> None:
        """Write what is kept to a pool of our own; others may still hold the old pages."""
        table = PageTable(self.pool.empty_like(), self.table.rows)
        pages, offsets = table.slots(counts.cpu().numpy())
        valid = torch.arange(kept["keys"].shape[1], device=counts.device) < counts[:, None]
        for name, plane in table.pool.planes.items():
            plane[pages, offsets] = kept[name][valid].to(plane.dtype)
        self.table.release()
        self.table = table

    def truncate(self, counts: np.ndarray) -> None:
        self.table.lengths = np.minimum(self.table.lengths, counts.reshape(-1)).astype(np.int32)
        self.table.trim()

    def select(self, rows: np.ndarray) -> "DenseSegment":
        wide = (np.asarray(rows)[:, None] * self.heads + np.arange(self.heads)).reshape(-1)
        return DenseSegment(self.table.select(wide), self.heads, self.compute)

    def clear(self) -> None:
        # To a pool of our own: in the one that a fork shares, our next tokens would lie in the other's memory for good.
        fresh = PageTable(self.pool.empty_like(), self.table.rows)
        self.table.release()
        self.table = fresh

    def compact(self) -> None:
        self.table.compact()
