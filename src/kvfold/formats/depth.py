"""Depth: a direction for each key and value, which two layers may share, and its length, which they may not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.formats.by_token import ByToken, TokenSegment
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk
from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.options import check_choice, check_int, shown
from kvfold.pages import PAGE_SIZE, PageTable, Plane
from kvfold.rotation import Compact

KEY_NORM, VALUE_NORM = "key_norm", "value_norm"
"""Columns (float32): the lengths of a token's key and value."""
NORMS = {"keys": KEY_NORM, "values": VALUE_NORM}


@dataclass(frozen=True)
class Depth(ByToken):
    """Unit vectors in the model's dtype, their lengths beside them; `side` 0 for the lower layer of a pair, 1 for the
    upper. Addressable token by token; what one layer alone drops or changes is copied first.
    """

    side: int
    page_size: int = PAGE_SIZE

    traits: ClassVar[Traits] = Traits()
    beside = "state"

    def __post_init__(self) -> None:
        check_choice("side", self.side, (0, 1))
        check_int("page_size", self.page_size, 1)

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What its pages hold from the start."""
        sizes = {"keys": Plane(spec.key_size, spec.dtype), "values": Plane(spec.value_size, spec.dtype)}
        norms = {f"{name}.{self.side}": Plane(None, torch.float32) for name in NORMS.values()}
        return sizes | {POSITION: Plane(None, torch.int32)} | norms

    def open(self, spec: Spec) -> "DepthSegment":
        table = open_table(self, spec, self.planes(spec), self.page_size)
        return DepthSegment(table, spec.heads, spec.dtype, self.side, np.zeros(spec.rows, dtype=np.int64))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        self._check_text(spec, said, tensors, seen)
        super().check(spec, said, tensors, seen)

    def _check_text(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """What is remembered of the text."""
        upto, state = said.get("upto"), tensors.get("state")
        ints = isinstance(upto, list) and len(upto) == spec.rows and all(type(x) is int and x >= 0 for x in upto)
        if not ints:
            raise ValueError(f"upto={shown(upto)} must be {spec.rows} ints")
        if seen is not None and any(x > most for x, most in zip(said["upto"], seen, strict=True)):
            raise ValueError(f"upto={shown(upto)} must be no more than the tokens read, {seen.tolist()}")
        if state is not None and (state.dim() != 2 or len(state) != spec.rows):
            raise ValueError(f"state={tuple(state.shape)} must be ({spec.rows}, N)")

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "DepthSegment":
        self._check_text(spec, said, tensors)
        planes, state = self.planes(spec), tensors.get("state")
        if isinstance(twin, DepthSegment) and not planes.keys() <= twin.pool.specs.keys():
            lacking = sorted(planes.keys() - twin.pool.specs.keys())
            raise ValueError(f"{lacking[0]} is not among what the segment that holds the same pages has")
        segment: DepthSegment = super().restore(spec, said, tensors, twin)
        segment.upto = np.array(said["upto"], dtype=np.int64)
        segment.remembered = None if state is None else state.to(spec.device)
        return segment

    def segment(self, chunk: Chunk) -> "DepthSegment":
        """`open` for tokens like those of `chunk`."""
        return self.open(Spec.of(chunk))


class DepthSegment(TokenSegment):
    """Directions on pages that the other layer's segment may hold too, by reference counts, as two beams hold theirs.

    Lengths and all columns but the position belong to one side; they lie on the same pages, under names of their own.
    `upto` (B,): how much of each row's text has been gone through for tokens to share; `remembered` is what the method
    that shares keeps of it.
    """

    def __init__(
        self, table: PageTable, heads: int, compute: torch.dtype, side: int, upto: np.ndarray,
        remembered: Float[Tensor, "B N"] | None = None,
    ):  # fmt: skip
        super().__init__(table, heads, compute)
        self.side, self.upto, self.remembered = side, upto, remembered

    def bytes_beside(self, counted: set[int]) -> int:
        beside = self.upto.nbytes + (0 if self.remembered is None else self.remembered.nbytes)
        return super().bytes_beside(counted) + beside

    def own(self, name: str) -> str:
        """The name that a column of this side's has on the pages."""
        return name if name == POSITION else f"{name}.{self.side}"

    def names(self) -> dict[str, str]:
        mine = [name.removesuffix(f".{self.side}") for name in self.pool.planes if name.endswith(f".{self.side}")]
        return {name: self.own(name) for name in (POSITION, *mine) if name not in NORMS.values()}

    def encode(self, what: str, states: Tensor) -> dict[str, Tensor]:
        return {what: F.normalize(states.float(), dim=-1), **self.norms(what, states)}

    def norms(self, what: str, states: Tensor) -> dict[str, Tensor]:
        """The plane of the lengths of keys or values."""
        return {self.own(NORMS[what]): torch.linalg.vector_norm(states.float(), dim=-1)}

    def states(self, what: str) -> Tensor:
        return (self.plane(what) * self.column(NORMS[what])[..., None]).to(self.compute)

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """A key's length multiplies its logit, a value's its weight: nothing is restored."""

        def block(start: int, stop: int) -> Block:
            norms = (self.column(norm, start, stop) for norm in (KEY_NORM, VALUE_NORM))
            return Block(self.plane("keys", start, stop), self.plane("values", start, stop), *norms)

        width = self.pool.planes["values"].shape[-1]
        return attend_blocks(
            q, scale, self.valid(), width, block, self.column, mass=LOG_MASS if self.weighed else None, read=read,
            compact=compact, weights=weights,
        )  # fmt: skip

    def append_shared(
        self, above: "DepthSegment", lower: Chunk, upper: Chunk, keys: Float[Tensor, "B H T D"],
        values: Float[Tensor, "B H T Dv"],
    ) -> None:  # fmt: skip
        """Tokens that this layer (`lower`) and the one of `above` (`upper`, the same slots) hold by one direction."""
        assert self.twin(above), "two segments can't take the same tokens: they don't hold the same ones"
        above.table.release()  # so that the pages are written where they lie
        if not self.table.regular:
            self.table.trim()
        self.compact()
        planes = {"keys": keys, "values": values, POSITION: lower.positions}
        for segment, chunk in ((self, lower), (above, upper)):
            columns = {segment.own(name): column for name, column in chunk.columns.items() if name != POSITION}
            planes |= columns | segment.norms("keys", chunk.keys) | segment.norms("values", chunk.values)
        for name, plane in planes.items():
            self.pool.add_plane(name, Plane(None, plane.dtype))
        self.add(planes, lower.valid)
        above.table = self.table.fork()

    def twin(self, other: "DepthSegment") -> bool:
        """Whether both hold the same pages, or nothing."""
        return not (self.longest or other.longest) or self.table.same_pages(other.table)

    def same_pages(self, other: Any) -> bool:
        return isinstance(other, DepthSegment) and self.twin(other)

    def like(self, table: PageTable, rows: np.ndarray) -> "DepthSegment":
        known = self.remembered
        kept = None if known is None else known[rows.tolist()]
        return DepthSegment(table, self.heads, self.compute, self.side, self.upto[rows], kept)

    def join(self, other: Any) -> None:
        if not isinstance(other, DepthSegment) or other.side != self.side:
            found = f"{type(other).__name__} of side {getattr(other, 'side', None)}"
            raise ValueError(f"other={found} must be a DepthSegment of side {self.side}")
        known = [x.remembered for x in (self, other) if x.batch]
        if any(x is None for x in known) and any(x is not None for x in known):
            raise ValueError("other: its text and ours must both have been gone through, or neither")
        super().join(other)
        self.upto = np.concatenate([self.upto, other.upto])
        self.remembered = torch.cat([x for x in known if x is not None]) if any(x is not None for x in known) else None

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        said, tensors = super().state(of=of)
        beside = {} if self.remembered is None else {"state": self.remembered.contiguous()}
        return said | {"upto": self.upto.tolist()}, tensors | beside

    def cropped(self, limit: np.ndarray) -> None:
        self.upto = np.minimum(self.upto, limit)
        if self.remembered is not None and (limit == 0).any():  # of a row whose text is gone as a whole: NaN
            gone = torch.from_numpy(limit == 0).to(self.remembered.device)
            self.remembered = self.remembered.masked_fill(gone[:, None], torch.nan)

    def drop_tokens(self) -> None:
        """Drop the tokens, but not what is remembered of the text."""
        super().clear()

    def clear(self) -> None:
        self.drop_tokens()
        self.upto, self.remembered = np.zeros_like(self.upto), None
