"""Dense: keys and values as they are, in the model's dtype or a narrower one, on pages."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvfold import ops
from kvfold.formats.paged import PagedSegment
from kvfold.formats.segment import Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk, LateChunk
from kvfold.pages import PAGE_SIZE, PagePool, PageTable, Plane
from kvfold.rotation import Compact


@dataclass(frozen=True)
class Dense:
    """Keys and values unchanged (`dtype=None`) or rounded to `dtype`; addressable token by token, exact to crop."""

    dtype: torch.dtype | None = None
    page_size: int = PAGE_SIZE

    @property
    def traits(self):
        return Traits(graphs=True)

    def open(self, spec):
        k = torch.zeros(spec.rows, spec.heads, 0, spec.key_size, dtype=spec.dtype, device=spec.device)
        v = torch.zeros(spec.rows, spec.heads, 0, spec.value_size, dtype=spec.dtype, device=spec.device)
        return self.segment(Chunk(k, v, k[..., 0].bool()))

    def restore(self, spec, said, tensors, twin=None):
        raise NotImplementedError

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


class DenseSegment(PagedSegment):
    """Keys and values as they are."""

    def __init__(self, table: PageTable, heads: int, compute: torch.dtype):
        super().__init__(table, heads)
        self.compute = compute

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        mass = LOG_MASS if LOG_MASS in self.pool.planes else None
        return ops.attend_pages(
            q, self.table, scale, mass=mass, read=read, compact=compact, position=POSITION, weights=weights
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`append` of one token to each row, (B, H, 1, D) at text positions (B, 1), and `attend`: a decode step."""
        mass = LOG_MASS if LOG_MASS in self.pool.planes else None
        wide = positions[:, None].expand(-1, self.heads, -1)
        planes = {"keys": k.flatten(0, 1), "values": v.flatten(0, 1), POSITION: wide.reshape(-1, 1)}
        return ops.step_pages(q, self.table, planes, scale, mass=mass, weights=weights)

    def reserve(self) -> list[Tensor]:
        """Make room for one more token in each row; the tensors on the device that a step reads and writes."""
        self.table.reserve()
        return [*self.pool.planes.values(), *self.table.on_device()]

    def dense(self) -> Chunk:
        columns = {n: self._rows(self.table.dense(n)) for n in self.pool.planes if n not in ("keys", "values")}
        valid = self._rows(self.table.valid())
        return LateChunk(lambda: self._states("keys"), lambda: self._states("values"), valid, columns)

    def _states(self, name: str) -> Tensor:
        return self._rows(self.table.dense(name)).to(self.compute)

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        self._add_columns(chunk.columns)
        planes = {"keys": chunk.keys, "values": chunk.values, **chunk.columns}
        rows = {name: plane.flatten(0, 1) for name, plane in planes.items()}
        ops.append_pages(self.table, rows, None if even else chunk.valid.flatten(0, 1))

    def _add_columns(self, columns: Mapping[str, Tensor]) -> None:
        for name, column in columns.items():
            self.pool.add_plane(name, Plane(None, column.dtype))

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        self._add_columns(columns)
        rows = {name: column.flatten(0, 1) for name, column in columns.items()}
        ops.keep_pages(self.table, mask.flatten(0, 1), rows, slack=slack)

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """Write (B, H, N, D) keys and values (None: none) over `slots` (B, H, N), -1 for none."""
        chosen = slots.flatten(0, 1)
        some = chosen >= 0
        rows, at = some.nonzero()[:, 0].cpu().numpy(), chosen[some].cpu().numpy()
        pages, offsets = self.table.writable(rows, at)
        for name, new in (("keys", keys), ("values", values)):
            if new is not None:
                plane = self.pool.planes[name]
                plane[pages, offsets] = new.flatten(0, 1)[some].to(plane.dtype)

    def select(self, rows: np.ndarray) -> "DenseSegment":
        return DenseSegment(self._table_of(rows), self.heads, self.compute)
