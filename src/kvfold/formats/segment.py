"""What every format promises: a segment holds tokens of one layer and answers queries over them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats.tokens import Chunk
from kvfold.pages import PagePool
from kvfold.rotation import Compact, Rope


@dataclass(frozen=True)
class Traits:
    """What a format can do. What is addressed is checked when a method is composed with it, crops when one comes."""

    addressed: Literal["token", "page", "whole"] = "token"
    """What can be dropped or written over by itself: a token, a page of them, or nothing."""
    frame: Literal["rotated", "unrotated"] = "rotated"
    """Whether keys are held as the model rotated them. One that is held un-rotated could be put anywhere; all the same
    `dense` gives it, and `append` takes it, as the model rotated it for its position."""
    crops: Literal["exact", "approximate", "never"] = "exact"
    """What is left after a crop: what would be there had the tokens never come; that but for rounding; no crop."""
    requantises: bool = False
    """Whether what is not addressed token by token drops tokens all the same, by writing their page anew."""
    holds: bool = True
    """Whether what goes there stays a token. Else it is gone as after a `Keep`, but for its part in the answers of the
    segment (`Folding`)."""
    graphs: bool = False
    """Whether a decode step may be captured as a CUDA graph (`Segment.reserve`)."""

    @property
    def drops(self) -> bool:
        """Whether single stored tokens can be dropped."""
        return self.addressed == "token" or self.requantises


@dataclass(frozen=True)
class Spec:
    """The layer that a segment is for."""

    rows: int
    """Sequences of the batch, B."""
    heads: int
    """KV heads, H."""
    key_size: int
    value_size: int
    dtype: torch.dtype
    """What the model computes in."""
    device: torch.device
    layer: int = 0
    """Index among the model's layers."""
    rope: Rope | None = None
    artefact: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What was measured on the model for this layer, by the key that a format names."""
    group: int = 1
    """Query heads of each KV head, G."""
    arena: Any = None
    """The `kvfold.pages.Arena` that the pages come from; None: they are the segment's own."""
    memory: Any = None
    """The `kvfold.pages.FastMemory` or `HostMemory` that its pages lie in; None: they are where they are read."""

    @classmethod
    def of(cls, chunk: Chunk, **more: Any) -> "Spec":
        """For tokens like those of `chunk`."""
        keys, values = chunk.keys, chunk.values
        b, h, _, d = keys.shape
        return cls(b, h, d, values.shape[-1], keys.dtype, keys.device, **more)


@runtime_checkable
class Segment(Protocol):
    """Tokens of one layer in one format. Rows are (sequence, KV head) pairs and may differ in length.

    Slots are places in what `columns` and `dense` give; a slot without a token is not valid. Within a (sequence, head)
    tokens stand in the order in which they were appended.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, tables, scales and indexes included."""
        ...

    def bytes_beside(self, counted: set[int]) -> int:
        """`nbytes` without what is `counted` (ids of pools that two layers share); what counts here then is, too."""
        ...

    def nbytes_with(self, more: np.ndarray) -> int:
        """`nbytes` with `more[b, h]` more tokens, which nobody has to have: pages up to the last, no room beyond."""
        ...

    def row_nbytes(self) -> np.ndarray:
        """Bytes that each sequence's tokens take, (B,); what all have in common is not in it."""
        ...

    @property
    def longest(self) -> int:
        """Slots of the longest row; what `columns` and `dense` have."""
        ...

    def counts(self) -> np.ndarray:
        """Tokens of each row, (B, H)."""
        ...

    def lengths(self) -> np.ndarray:
        """Slots of each row that are not behind its last token, (B, H)."""
        ...

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        """Pages that must be free, by pool, for `more[b, h]` more tokens, for `Arena.check`."""
        ...

    def attend(
        self,
        q: Float[Tensor, "B H G Q D"],
        scale: float,
        *,
        read: Bool[Tensor, "B H T"] | None = None,
        compact: Compact | None = None,
        weights: bool = False,
    ) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
        """(out, lse, None) over the segment's tokens, or over those that `read` marks; `compact` re-rotates keys on
        read. With `weights` the third may be what each slot got of each query (softmax over this segment).
        """
        ...

    def step(
        self,
        q: Float[Tensor, "B H G 1 D"],
        k: Float[Tensor, "B H 1 D"],
        v: Float[Tensor, "B H 1 Dv"],
        positions: Int[Tensor, "B 1"],
        scale: float,
        *,
        weights: bool,
    ) -> tuple[Float[Tensor, "B H G 1 Dv"], Float[Tensor, "B H G 1"], Float[Tensor, "B H G 1 T"] | None]:
        """`append` of one token to each row, at text positions `positions`, and `attend`: a decode step."""
        ...

    def columns(self) -> tuple[Bool[Tensor, "B H T"], Mapping[str, Tensor]]:
        """Which slots are tokens, and the named numbers of each (B, H, T): no key or value is looked at."""
        ...

    def dense(self) -> Chunk:
        """All slots as dense tensors, padded to the longest row; to be read before the next write, and not written.

        Keys and values are worked out when somebody looks at them.
        """
        ...

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Add the chunk's valid tokens to the end of each row; `even`: all of them are valid."""
        ...

    def keep(self, mask: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """Drop the tokens that `mask` does not mark, set `columns` on the rest, and give memory back.

        `slack`: it may wait until there is enough of it, as when every step drops a token. Raises ValueError, and
        changes nothing, where the format drops no single tokens and some, not all, of those that it addresses go.
        """
        ...

    def amend(self, slots: Int[Tensor, "B H N"], keys: Tensor | None, values: Tensor | None) -> None:
        """Write (B, H, N, D) keys and values (None: none) over `slots`, -1 for none; token by token formats only."""
        ...

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """Keep the first `counts[b, h]` tokens of each row: what a crop takes back stands at the end.

        `slack`: a little room may stay for the tokens that come instead.
        """
        ...

    def cropped(self, limit: np.ndarray) -> None:
        """The text from position `limit` (B,) on is taken back: what is remembered of it, beside tokens, goes."""
        ...

    def select(self, rows: np.ndarray) -> "Segment":
        """A segment whose sequence i is sequence `rows[i]` of this one; shares storage until written."""
        ...

    def join(self, other: "Segment") -> None:
        """Take the sequences of another segment of this format behind ours; `other` is used up."""
        ...

    def clear(self) -> None:
        """Drop everything."""
        ...

    def drop_tokens(self) -> None:
        """Drop all tokens, but not what is remembered of the text (where anything is)."""
        ...

    def compact(self) -> None:
        """Give memory back that no row holds any more, where that is worth moving for; after `select`."""
        ...

    def reserve(self) -> list[Tensor]:
        """Make room for one more token in each row; the tensors on the device that a step reads and writes.

        Only where the format's traits say `graphs`.
        """
        ...

    def replayed(self) -> None:
        """A captured step ran: count its token in each row here; the device has."""
        ...

    @property
    def shared(self) -> bool:
        """Whether somebody else holds some of its pages."""
        ...

    def same_pages(self, other: "Segment") -> bool:
        """Whether both hold the same pages of tokens, as two layers may: such are saved once."""
        ...

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it holds, as JSON and named tensors, without gaps; `Format.restore` makes a segment of it that goes on
        in the same way, bit for bit. `of`: the name under which `same_pages` are written already; they are left out.
        """
        ...


class Uncaptured:
    """A segment of a format whose traits say `graphs=False`."""

    def reserve(self) -> list[Tensor]:
        """Raises NotImplementedError: no step is captured."""
        raise NotImplementedError(f"{type(self).__name__}: the traits of its format say graphs=False")

    def replayed(self) -> None:
        """As `reserve`."""
        self.reserve()


@runtime_checkable
class Hearing(Protocol):
    """A segment that is told something of its rows, beside their tokens, by `Store`."""

    def hear(self, told: Mapping[str, Tensor], which: Bool[Tensor, "B H"]) -> None:
        """`told`: tensors (B, H, ...) by name; it concerns the rows and heads of `which`, which get tokens next."""
        ...


@runtime_checkable
class Folding(Protocol):
    """A segment that holds no tokens, only what became of those that went there: it has no slots, and answers."""

    @property
    def filled(self) -> bool:
        """Whether anything went there."""
        ...

    def check_cropped(self, limit: np.ndarray) -> None:
        """Raise ValueError, and change nothing, where text from position `limit` (B,) on can't be taken back."""
        ...


@runtime_checkable
class Supposing(Protocol):
    """A format whose segments are as large whatever was measured for them."""

    def supposed(self, spec: Spec) -> Mapping[str, Any]:
        """What may stand in for `Spec.artefact` where only sizes are asked for."""
        ...


@runtime_checkable
class Format(Protocol):
    """A recipe for segments; a method names it in `Store`, or as the one that all its tokens go to."""

    def __hash__(self) -> int:
        """Equal formats are one: their options are all that they are."""
        ...

    @property
    def traits(self) -> Traits:
        """What it can do."""
        ...

    def open(self, spec: Spec) -> Segment:
        """An empty segment."""
        ...

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """Raise ValueError unless `tensors` are what a segment's `said` and `spec` tell; nothing is allocated.

        `seen` (B,): text tokens that each row has read, which no position may exceed. Of a segment that holds another
        one's pages `tensors` are that one's.
        """
        ...

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> Segment:
        """A segment that holds what `state` gave; `twin`: the one that holds the same pages.

        Raises ValueError, before anything is allocated, where the tensors are not what `said` and `spec` tell.
        """
        ...
