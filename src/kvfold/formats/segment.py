"""What every format promises: a segment holds tokens of one layer and answers queries over them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

POSITION = "position"
"""Column (int32): a token's place in its row's text, counted without padding. Every segment has it."""

LOG_MASS = "log_mass"
"""Column (float32): log of how many tokens a slot stands for; added to its logits."""


@dataclass(frozen=True)
class Chunk:
    """Tokens as dense tensors: keys and values as the model made them, columns by name, and which slots are tokens."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T Dv"]
    valid: Bool[Tensor, "B H T"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Int[Tensor, "B H T"]:
        return self.columns[POSITION]

    def since(self, start: int) -> "Chunk":
        """The slots from `start` on."""
        columns = {name: column[..., start:] for name, column in self.columns.items()}
        return Chunk(self.keys[:, :, start:], self.values[:, :, start:], self.valid[..., start:], columns)

    def take(self, slots: Int[Tensor, "B H T"]) -> "Chunk":
        """Slot i of each (row, head) becomes what slot `slots[..., i]` was."""

        def wide(states: Tensor) -> Tensor:
            return states.gather(2, slots[..., None].expand(*slots.shape, states.shape[-1]))

        columns = {name: column.gather(-1, slots) for name, column in self.columns.items()}
        return Chunk(wide(self.keys), wide(self.values), self.valid.gather(-1, slots), columns)

    def but(self, valid: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor] | None = None) -> "Chunk":
        """The same keys and values with other slots valid, and other columns."""
        return Chunk(self.keys, self.values, valid, self.columns if columns is None else columns)


class LateChunk(Chunk):
    """Tokens whose keys and values are fetched when somebody looks at them: most decisions need only columns."""

    def __init__(
        self,
        keys: Callable[[], Tensor] | Tensor,
        values: Callable[[], Tensor] | Tensor,
        valid: Bool[Tensor, "B H T"],
        columns: Mapping[str, Tensor],
    ):
        self.__dict__ |= {"fetch": (keys, values), "valid": valid, "columns": columns}

    @cached_property
    def keys(self) -> Float[Tensor, "B H T D"]:
        return _fetched(self.__dict__["fetch"][0])

    @cached_property
    def values(self) -> Float[Tensor, "B H T Dv"]:
        return _fetched(self.__dict__["fetch"][1])

    def but(self, valid: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor] | None = None) -> Chunk:
        return LateChunk(lambda: self.keys, lambda: self.values, valid, self.columns if columns is None else columns)


def _fetched(states: Callable[[], Tensor] | Tensor) -> Tensor:
    return states if isinstance(states, Tensor) else states()


def join(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks one after another; a column that one of them lacks is zero there."""
    if len(chunks) == 1:
        return chunks[0]
    samples = {name: column for chunk in chunks for name, column in chunk.columns.items()}

    def column(chunk: Chunk, name: str) -> Tensor:
        if name in chunk.columns:
            return chunk.columns[name]
        return torch.zeros(chunk.valid.shape, dtype=samples[name].dtype, device=chunk.valid.device)

    return LateChunk(
        lambda: torch.cat([chunk.keys for chunk in chunks], 2),
        lambda: torch.cat([chunk.values for chunk in chunks], 2),
        torch.cat([chunk.valid for chunk in chunks], 2),
        {name: torch.cat([column(chunk, name) for chunk in chunks], 2) for name in samples},
    )


@runtime_checkable
class Segment(Protocol):
    """Tokens of one layer in one format. Rows are (sequence, KV head) pairs and may differ in length."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, tables included."""
        ...

    @property
    def longest(self) -> int:
        """Slots of the longest row; what `dense` has."""
        ...

    def counts(self) -> np.ndarray:
        """Tokens of each row, (B, H)."""
        ...

    def attend(
        self,
        q: Float[Tensor, "B H G Q D"],
        scale: float,
        *,
        read: Bool[Tensor, "B H T"] | None,
        compact: Any,
        weights: bool,
    ) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
        """(out, lse, None) over the segment's tokens, or over those that `read` marks; `compact` re-rotates keys on
        read. With `weights` the third may be what each slot got of each query (softmax over this segment).
        """
        ...

    def dense(self) -> Chunk:
        """All slots as dense tensors, padded to the longest row; to be read before the next write, and not written."""
        ...

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Add the chunk's valid tokens to the end of each row; `even`: all of them are valid."""
        ...

    def keep(self, mask: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """Drop the tokens that `mask` does not mark, set `columns` on the rest, and give memory back.

        `slack`: it may wait until there is enough of it, as when every step drops a token.
        """
        ...

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """Keep the first `counts[b, h]` tokens of each row: what a crop takes back stands at the end.

        `slack`: a little room may stay for the tokens that come instead.
        """
        ...

    def select(self, rows: np.ndarray) -> "Segment":
        """A segment whose sequence i is sequence `rows[i]` of this one; shares storage until written."""
        ...

    def clear(self) -> None:
        """Drop everything."""
        ...

    def compact(self) -> None:
        """Give memory back that no row holds any more, where that is worth moving for; after `select`."""
        ...


@runtime_checkable
class Format(Protocol):
    """A recipe for segments; a method names it in `Store`."""

    def segment(self, chunk: Chunk) -> Segment:
        """An empty segment for tokens like those of `chunk` (heads, sizes, device)."""
        ...
