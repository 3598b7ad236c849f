"""What every format promises: a segment holds tokens of one layer and answers queries over them."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats.tokens import Chunk


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
