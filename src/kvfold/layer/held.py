"""What one attention layer holds, apart from any pass: counted, cut, chosen and joined."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.formats import Format, Segment, Spec
from kvfold.layer.rows import Rows
from kvfold.layer.stored import Stored
from kvfold.rotation import Rope
from kvfold.views import Site

NOTHING = Spec(0, 0, 0, 0, torch.float32, torch.device("cpu"))


class Held:
    """One layer of a cache; `rows` is what the rows of the batch have read, the same for all layers.

    The operations are this layer's alone: its cache does the same to the rows.
    """

    def __init__(
        self, rows: Rows, layer: int, paged: tuple[int, ...] = (0,), depth: int = 1, rope: Rope | None = None,
        arena: Any = None, memory: Any = None,
    ):  # fmt: skip
        self.rows, self.arena, self.memory = rows, arena, memory
        self.site = Site(layer, paged.index(layer), paged, depth, rope)
        self._reset()

    def _reset(self) -> None:
        self.stored = Stored(NOTHING)
        self.number = 0  # the pass that it has read last, see `Rows`
        self.scale: float = 1.0
        self.module: Any = None

    @property
    def layer(self) -> int:
        """Index among the model's layers."""
        return self.site.layer

    @property
    def ordinal(self) -> int:
        """Index among the layers on pages."""
        return self.site.ordinal

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """KV heads, and the sizes of keys and values; None: nobody has attended yet."""
        spec = self.stored.spec
        return (spec.heads, spec.key_size, spec.value_size) if self.segments else None

    @property
    def seen(self) -> np.ndarray:
        """Text tokens that each row has read, (B,), padding not counted."""
        return self.rows.seen

    @property
    def prompt(self) -> np.ndarray:
        """How many it had read by the end of its last prompt, (B,)."""
        return self.rows.prompt

    @property
    def width(self) -> int:
        """Columns that the layer has read, padding counted; in a pass that has not come here yet, those before it."""
        return self.rows.width if self.number == self.rows.number else self.rows.width_before

    @property
    def batch(self) -> int:
        return self.rows.batch

    @property
    def segments(self) -> list[tuple[Format, Segment]]:
        """The segments with their formats."""
        return self.stored.segments

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layer holds, what the rows have read included."""
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        """`nbytes` without the page pools and the rows that another layer has `counted`."""
        rows = 0 if id(self.rows) in counted else self.rows.nbytes
        counted.add(id(self.rows))
        return rows + self.stored.bytes_beside(counted)

    def dense_bytes(self, tokens: int | None = None) -> int:
        """Bytes of keys and values that a dense cache would hold for as many tokens; None: as this one has read."""
        heads, d, dv = self.shape or (0, 0, 0)
        return int(self.seen.sum() if tokens is None else tokens) * heads * (d + dv) * self.stored.spec.dtype.itemsize

    def counts(self) -> np.ndarray:
        """Tokens stored for each (row, head), (B, H)."""
        return self.stored.counts() if self.segments else np.zeros((self.batch, 0), dtype=np.int64)

    def kept(self) -> list[list[list[int]]]:
        """Text positions stored, kept[row][head], ascending."""
        return self.stored.positions() if self.segments else [[] for _ in range(self.batch)]

    def alike(self, other: "Held") -> bool:
        """Whether a token's keys and values mean the same kind of vector in both layers."""
        frames = [(x.shape, x.stored.spec.dtype, x.stored.spec.device, x.site.rope) for x in (self, other)]
        return frames[0] == frames[1]

    def reserve_step(self) -> list[Tensor]:
        """Make room for one more token in each row; all tensors that such a step reads and writes on the device.

        While they stay the same ones, a CUDA graph may replay the step: `Rows.replayed` and ours count it each time.
        """
        return [self.rows.clock(self.stored.spec.device), *self.stored.open.reserve()]

    def replayed(self) -> None:
        """A captured step ran: count its token in each row, the device has."""
        self.stored.open.replayed()
        self.number = self.rows.number

    def mark(self) -> list[np.ndarray | Segment]:
        """What each segment holds, for `rewind`: how much, or where a crop would leave traces, a fork of it."""
        everyone = np.arange(self.batch)
        return [
            segment.counts().copy() if form.traits.crops == "exact" else segment.select(everyone)
            for form, segment in self.segments
        ]

    def rewind(self, mark: list[np.ndarray | Segment]) -> None:
        """Take back everything that was appended since; nothing may have been decided in between."""
        if not mark:
            self.clear()
            return
        for place, ((form, segment), before) in enumerate(zip(self.segments, mark, strict=True)):
            if isinstance(before, np.ndarray):
                segment.truncate(before)
            else:
                segment.clear()
                before.truncate(before.counts())  # which gives back what the pages have grown by
                self.stored.segments[place] = (form, before)
        self.number = self.rows.number

    def drop_from(self, limit: np.ndarray) -> None:
        """Drop the tokens whose text position is `limit` (B,) or later."""
        self.stored.drop_from(limit)

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; pages are shared until one of the sharers writes."""
        self.stored.select(rows)

    def check_join(self, other: "Held") -> None:
        """Raise ValueError where the rows of another cache's layer can't stand behind ours."""
        self.stored.check_join(other.stored)

    def join(self, other: "Held") -> None:
        """Take the rows of another cache's layer behind ours; `other` is used up."""
        if not self.segments:
            self.stored, self.scale, self.module = other.stored, other.scale, other.module
        else:
            self.stored.join(other.stored)

    def clear(self) -> None:
        """Forget everything."""
        self.stored.clear()
        self._reset()
