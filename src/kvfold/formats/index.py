"""What every index promises: it remembers little of each unit of tokens, and says what a query would find there.

The indexes themselves, and the choice among units, are in `kvfold.selectors`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats.chosen import Chosen
from kvfold.formats.picked import Picked
from kvfold.formats.segment import Spec
from kvfold.formats.tokens import Chunk
from kvfold.rotation import Rope

Handed = dict[Any, Any]
"""What layers have chosen that later ones of the same forward pass read; it goes when the pass ends."""


@runtime_checkable
class Remembered(Protocol):
    """What an index holds of one segment's tokens. Tokens are counted through each (row, KV head), in their order.

    A row's tokens from number n * unit on are its unit n; the last may still be growing.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns (float32) that it goes by: a token that comes without one has 0 there."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        ...

    def nbytes_with(self, units: int) -> int:
        """`nbytes` once the longest row has so many units; no room beyond."""
        ...

    def row_nbytes(self) -> np.ndarray:
        """Bytes of each sequence's part, (B,)."""
        ...

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """The valid ones are tokens `start[b, h]` and on of their row: one by one or all at once, it is the same."""
        ...

    def whole(self) -> Bool[np.ndarray, " B"]:
        """Which rows read everything at the step that `asks` was last called for, whatever the budget."""
        ...

    def begins(self, first: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
        """From where on tokens must be given again once those from `first[b, h]` on have changed: a unit's start."""
        ...

    def forget(self, units: np.ndarray) -> None:
        """Units `units[b, h]` and on are as if nothing of them had come."""
        ...

    def learn(self, tokens: Callable[[], Chunk], which: Bool[np.ndarray, "B H"]) -> None:
        """Before `scores`: what is fitted to tokens, as a codebook is, is fitted to those of `which` rows and heads.

        Once for each, to all `tokens` that it then holds but the newest, which asks; it holds from then on, whatever
        comes or goes, until that text is taken back (`unlearn`) or everything is forgotten (`clear`).
        """
        ...

    def unlearn(self, limit: Int[np.ndarray, "B H"]) -> None:
        """Text from position `limit[b, h]` on is taken back: what was fitted to any of it is to be fitted anew."""
        ...

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """The query of text position `seen[b]` - 1 as it is compared with what is remembered."""
        ...

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """What each unit is worth to what is `asked`, float32; -inf behind a row's `units[b, h]`."""
        ...

    def cropped(self, rows: Bool[np.ndarray, " B"]) -> None:
        """Some of the text of these rows was taken back: what is remembered of queries beside tokens goes."""
        ...

    def select(self, rows: np.ndarray) -> "Remembered":
        """Sequence i becomes what sequence `rows[i]` was."""
        ...

    def join(self, other: "Remembered") -> None:
        """Take the sequences of another behind ours."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it holds, for a file."""
        ...


@runtime_checkable
class Index(Protocol):
    """A recipe for what is remembered; equal ones are one, as formats are."""

    def __hash__(self) -> int: ...

    @property
    def unit(self) -> int:
        """Tokens that are read, or not, together."""
        ...

    @property
    def enough(self) -> int:
        """Units from which on a row and head choose among them: what is fitted needs some. Fewer are all read."""
        ...

    def open(self, spec: Spec) -> Remembered:
        """Of no token yet."""
        ...

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        """Raise ValueError unless `tensors` are what `Remembered.state` gives of rows with so many tokens."""
        ...

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> Remembered:
        """What `state` gave and `check` has looked at."""
        ...


class Selecting(Protocol):
    """What says which units of its tokens a query reads; equal ones are one, as formats are."""

    def __hash__(self) -> int: ...

    @property
    def index(self) -> Index:
        """What it goes by."""
        ...

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        ...

    @property
    def slots(self) -> bool:
        """Whether what is read attends at positions of its own (see `kvfold.selectors.Selection`)."""
        ...

    @property
    def far(self) -> int:
        """Tokens behind a query beyond which all stand as far away as the last of them; 0: each at its own place."""
        ...

    @property
    def heads(self) -> tuple[bool, ...] | None:
        """Which KV heads choose, None: all; what the others hold is nothing to an index or to a choice."""
        ...

    @property
    def reuses(self) -> bool:
        """Whether what was chosen may be read again (the last of `Chooser.choose`)."""
        ...

    def nbytes_with(self, spec: Spec, units: int) -> int:
        """Bytes of a choice that is kept for later, once the longest row has so many units."""
        ...


@runtime_checkable
class Chooser(Selecting, Protocol):
    """What chooses by an index."""

    def chooses(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H"]:
        """Which rows and heads, of so many tokens and such texts, read less than all."""
        ...

    def choose(
        self, remembered: Remembered, q: Float[Tensor, "B H G D"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"], last: Picked | None = None,
    ) -> tuple[Chosen | None, Picked | None]:  # fmt: skip
        """Which units each query head (S = G) or KV head (S = 1) reads, and what is to be handed in the next time.

        None: all of them, in every row. Tokens are `counts`, of texts of `seen`. `last`: what was chosen before.
        """
        ...


@dataclass(frozen=True, eq=False)
class ByBounds:
    """A choice that one kernel makes and reads by: see `kvfold.ops.attend_units`."""

    held: Float[Tensor, "B H N E"]
    """The largest of each channel of each unit's keys, then the largest of their negatives."""
    room: Int[np.ndarray, " B"]
    heads: str
    sinks: int
    recent: int


@dataclass(frozen=True, eq=False)
class ByKeys:
    """A choice of single tokens by votes on keys that have not turned, by one kernel: see `kvfold.ops.step_keys`."""

    held: Float[Tensor, "B H N D"]
    room: Int[np.ndarray, " B"]
    first: Int[np.ndarray, " B"]
    """Tokens at a row's front that are read anyhow."""
    before: Int[np.ndarray, " B"]
    """Those before its newest."""
    chooses: Bool[np.ndarray, " B"]
    """Which rows choose; the others read everything, where it stands."""
    heads: str
    layer: bool
    scale: float
    steps: int
    distance: int
    rope: Rope
    slots: bool


@runtime_checkable
class Compiled(Chooser, Protocol):
    """A chooser that may go by so little that a kernel can make its choice, and read by it."""

    def by_bounds(
        self, remembered: Remembered, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]
    ) -> ByBounds | None:
        """All that `choose` would go by; None where it goes by more, or all is read, or there is no list to make.

        What is remembered has room for so many tokens then, some of which may be about to come.
        """
        ...

    def by_keys(
        self, remembered: Remembered, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]
    ) -> ByKeys | None:
        """The same of one that goes by votes on keys."""
        ...


@runtime_checkable
class Handing(Chooser, Protocol):
    """A chooser whose choice later layers of the pass may read, too."""

    def hand(self, remembered: Remembered, chosen: Chosen | None, handed: Handed) -> None:
        """Hand on what was chosen; None: everything."""
        ...


@runtime_checkable
class Giving(Selecting, Protocol):
    """What lets its layer read everything, and by what that got of a query chooses for later layers."""

    def looks(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> bool:
        """Whether it wants to know what tokens get: some row reads a part. Raises ValueError where it can't choose."""
        ...

    def give(
        self, got: Float[Tensor, "B H G T"], unit: Int[Tensor, "B H T"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"], handed: Handed,
    ) -> None:  # fmt: skip
        """Hand on what it chooses by what each slot got, of attention that adds up to 1; `unit`: whose, -1 no token."""
        ...


@runtime_checkable
class Taking(Selecting, Protocol):
    """What lets its layer read what an earlier one has chosen in the same pass."""

    def take(self, counts: Int[np.ndarray, "B H"], handed: Handed, remembered: Remembered) -> Chosen | None:
        """Which units are read, of what is `remembered` here; None: all.

        Raises ValueError where the choice was made among other tokens.
        """
        ...


@runtime_checkable
class Weighing(Protocol):
    """A chooser of values alone: every key is asked, and what it got says whether its value is read."""

    @property
    def renormalize(self) -> bool:
        """Whether the weights of what is read sum to 1; else they are those of the softmax over all keys."""
        ...

    def chooses(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H"]:
        """See `Chooser.chooses`."""
        ...

    def weigh(
        self, weights: Float[Tensor, "B H G T"], valid: Bool[Tensor, "B H T"], seen: Int[np.ndarray, " B"]
    ) -> Bool[Tensor, "B H S T"]:
        """Whose values each query head (S = G) or KV head (S = 1) reads, of tokens that got so much of each query."""
        ...


Reader = Chooser | Giving | Taking
"""Whatever a method may let a layer's generated tokens read by."""
