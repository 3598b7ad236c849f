"""Depth: a direction for each key and value, which two layers may share, and its length, which they may not."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.paged import PagedSegment
from kvfold.formats.segment import Traits
from kvfold.formats.tokens import LOG_MASS, POSITION, Chunk, LateChunk
from kvfold.pages import PAGE_SIZE, PagePool, PageTable, Plane
from kvfold.rotation import Compact

KEY_NORM, VALUE_NORM = "key_norm", "value_norm"
"""Columns (float32): the lengths of a token's key and value."""
BLOCK_ELEMENTS = 1 << 22
"""Numbers in float32 held at once while attending: 16 MB."""


@dataclass(frozen=True)
class Depth:
    """Unit vectors in the model's dtype, their lengths beside them; `side` 0 for the lower layer of a pair, 1 for the
    upper. Addressable token by token; what one layer alone drops or changes is copied first.
    """

    side: int
    page_size: int = PAGE_SIZE

    @property
    def traits(self):
        return Traits()

    def open(self, spec):
        k = torch.zeros(spec.rows, spec.heads, 0, spec.key_size, dtype=spec.dtype, device=spec.device)
        v = torch.zeros(spec.rows, spec.heads, 0, spec.value_size, dtype=spec.dtype, device=spec.device)
        return self.segment(Chunk(k, v, k[..., 0].bool()))

    def restore(self, spec, said, tensors, twin=None):
        raise NotImplementedError

    def segment(self, chunk: Chunk) -> "DepthSegment":
        planes = {
            "keys": Plane(chunk.keys.shape[-1], chunk.keys.dtype),
            "values": Plane(chunk.values.shape[-1], chunk.values.dtype),
            POSITION: Plane(None, torch.int32),
        }
        batch, heads = chunk.valid.shape[:2]
        table = PageTable(PagePool(planes, chunk.keys.device, self.page_size), batch * heads)
        return DepthSegment(table, heads, chunk.keys.dtype, self.side, np.zeros(batch, dtype=np.int64))


class DepthSegment(PagedSegment):
    """Directions on pages that the other layer's segment may hold too, by reference counts, as two beams hold theirs.

    Lengths and all columns but the position belong to one side; they lie on the same pages, under names of their own.
    `upto` (B,): how much of each row's text has been gone through for tokens to share; `state` is what the method that
    shares remembers of it.
    """

    def __init__(
        self, table: PageTable, heads: int, compute: torch.dtype, side: int, upto: np.ndarray,
        state: Float[Tensor, "B N"] | None = None,
    ):  # fmt: skip
        super().__init__(table, heads)
        self.compute, self.side, self.upto, self.state = compute, side, upto, state

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.upto.nbytes + (0 if self.state is None else self.state.nbytes)

    def own(self, name: str) -> str:
        """The name that a column of this side's has on the pages."""
        return name if name == POSITION else f"{name}.{self.side}"

    def _plane(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._rows(self.table.dense(name, start, stop))

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """A key's length multiplies its logit, a value's its weight: nothing is restored."""
        (b, h, g, n, d), size = q.shape, self.longest
        block, seen = q.reshape(b, h, g * n, d).float(), self._rows(self.table.valid())
        ranks = None if compact is None else seen.cumsum(-1) - 1
        seen = seen if read is None else seen & read
        out = block.new_zeros(b, h, g * n, self.pool.planes["values"].shape[-1])
        lse = block.new_full((b, h, g * n), -torch.inf)
        step = max(16, BLOCK_ELEMENTS // max(1, b * h * max(g * n, d)))
        for i in range(0, size, step):
            stop = i + step
            directions, values = (self._plane(name, i, stop) for name in ("keys", "values"))
            key_norm, value_norm = (self._plane(self.own(name), i, stop) for name in (KEY_NORM, VALUE_NORM))
            if compact is not None and ranks is not None:
                turn, places = compact.of(i, stop), self._plane(POSITION, i, stop)
                directions = turn.rotate_keys(directions, places, ranks[..., i:stop])
            logits = block @ directions.float().mT * (key_norm * scale)[:, :, None]
            if self.own(LOG_MASS) in self.pool.planes:
                logits = logits + self._plane(self.own(LOG_MASS), i, stop)[:, :, None]
            logits = logits.masked_fill(~seen[:, :, None, i:stop], -torch.inf)
            sums = logits.logsumexp(-1)
            share = torch.exp(logits - sums.masked_fill(sums == -torch.inf, 0.0)[..., None])
            out, lse = ops.merge([(out, lse), ((share * value_norm[:, :, None]) @ values.float(), sums)])
        return out.view(b, h, g, n, -1).to(q.dtype), lse.view(b, h, g, n), None

    def dense(self) -> Chunk:
        names = [name.removesuffix(f".{self.side}") for name in self.pool.planes if name.endswith(f".{self.side}")]
        names = [POSITION, *(name for name in names if name not in (KEY_NORM, VALUE_NORM))]
        columns = {name: self._plane(self.own(name)) for name in names}
        valid = self._rows(self.table.valid())
        return LateChunk(
            lambda: self._restored("keys", KEY_NORM), lambda: self._restored("values", VALUE_NORM), valid, columns
        )

    def _restored(self, directions: str, norm: str) -> Tensor:
        if not self.longest:
            return self._plane(directions).to(self.compute)
        return (self._plane(directions) * self._plane(self.own(norm))[..., None]).to(self.compute)

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Tokens of this layer alone, by their own directions."""
        keys, values = (F.normalize(x.float(), dim=-1) for x in (chunk.keys, chunk.values))
        self._write(chunk, keys, values, self._side(chunk), even)

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
        self._write(lower, keys, values, {**self._side(lower), **above._side(upper)}, False)
        above.table = self.table.fork()

    def twin(self, other: "DepthSegment") -> bool:
        """Whether both hold the same pages, or nothing."""
        mine, theirs = self.table, other.table
        if not mine.longest and not theirs.longest:
            return True
        same = mine.pool is theirs.pool and np.array_equal(mine.lengths, theirs.lengths)
        return same and np.array_equal(mine.table, theirs.table) and not (mine.holed or theirs.holed)

    def _side(self, chunk: Chunk) -> dict[str, Tensor]:
        """What belongs to this side alone."""
        columns = {name: column for name, column in chunk.columns.items() if name != POSITION}
        columns[KEY_NORM], columns[VALUE_NORM] = (
            torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) for x in (chunk.keys, chunk.values)
        )
        return {self.own(name): column for name, column in columns.items()}

    def _write(self, chunk: Chunk, keys: Tensor, values: Tensor, columns: Mapping[str, Tensor], even: bool) -> None:
        self._add_planes(columns)
        planes = {"keys": keys, "values": values, POSITION: chunk.positions, **columns}
        rows = {name: plane.flatten(0, 1) for name, plane in planes.items()}
        ops.append_pages(self.table, rows, None if even else chunk.valid.flatten(0, 1))

    def _add_planes(self, columns: Mapping[str, Tensor]) -> None:
        for name, column in columns.items():
            self.pool.add_plane(name, Plane(None, column.dtype))

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        mine = {self.own(name): column for name, column in columns.items()}
        self._add_planes(mine)
        rows = {name: column.flatten(0, 1) for name, column in mine.items()}
        ops.keep_pages(self.table, mask.flatten(0, 1), rows, slack=slack)

    def select(self, rows: np.ndarray) -> "DepthSegment":
        state = None if self.state is None else self.state[torch.from_numpy(np.asarray(rows)).to(self.state.device)]
        upto = self.upto[np.asarray(rows)]
        return DepthSegment(self._table_of(rows), self.heads, self.compute, self.side, upto, state)

    def cropped(self, limit):
        self.upto = np.minimum(self.upto, limit)

    def drop_tokens(self) -> None:
        """Drop the tokens, but not what is remembered of the text."""
        super().clear()

    def clear(self) -> None:
        self.drop_tokens()
        self.upto, self.state = np.zeros_like(self.upto), None
