"""Segments on pages whose tokens are written, dropped and written over one by one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from kvfold import ops
from kvfold.formats.paged import PagedSegment, check_paged, of_tokens, one_each, restored
from kvfold.formats.segment import Segment, Spec
from kvfold.formats.tokens import Chunk
from kvfold.pages import Plane


class ByToken(ABC):
    """A format whose segments are pages of tokens, each for itself, and perhaps something beside them."""

    page_size: int
    beside: ClassVar[str | None] = None
    """What a state calls the tensor that is of no token."""

    @abstractmethod
    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""

    @abstractmethod
    def open(self, spec: Spec) -> Any:
        """See `Format.open`."""

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """See `Format.check`."""
        tokens = of_tokens(tensors, self.beside)
        check_paged(self.planes(spec), self.page_size, spec, said, tokens, seen)

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> Any:
        """See `Format.restore`."""
        if twin is None:
            self.check(spec, said, tensors)
        return restored(lambda: self.open(spec), spec, said, of_tokens(tensors, self.beside), twin)


class TokenSegment(PagedSegment):
    """A format says what planes hold of keys and of values."""

    @abstractmethod
    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        """What planes hold of "keys" or "values" (B, H, T, D)."""

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        planes = self.encode("keys", chunk.keys) | self.encode("values", chunk.values)
        self.add(planes | self.add_columns(chunk.columns), None if even else chunk.valid)

    def add(self, planes: Mapping[str, Tensor], valid: Tensor | None) -> None:
        """Write planes (B, H, T, ...) of new tokens; `valid`: which are (None: all)."""
        rows = {name: plane.flatten(0, 1) for name, plane in planes.items()}
        ops.append_pages(self.table, rows, None if valid is None else valid.flatten(0, 1))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        self.append(one_each(k, v, positions), even=True)
        return self.attend(q, scale, weights=weights)

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        rows = self.add_columns(columns)
        for name, column in rows.items():
            rows[name] = column.flatten(0, 1)
        ops.keep_pages(self.table, mask.flatten(0, 1), rows, slack=slack)

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        chosen = slots.flatten(0, 1)
        some = chosen >= 0
        rows, at = some.nonzero()[:, 0].cpu().numpy(), chosen[some].cpu().numpy()
        new = {} if keys is None else self.encode("keys", keys)
        new |= {} if values is None else self.encode("values", values)
        self.table.write(rows, at, {name: plane.flatten(0, 1)[some] for name, plane in new.items()})

    def close(self) -> None:
        """Move the rest of a row up to where tokens were dropped."""
        if self.table.holed:
            self.keep(self.valid(), {})

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Closes holes first, so that what is read back lies as this does."""
        self.close()
        return super().state(of=of)
