"""A choice that some KV heads of a layer make; the others read what they always read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import Chosen, Chunk, Index, LateChunk, Picked, Remembered, Spec, register
from kvfold.options import shown
from kvfold.selectors.always import Always
from kvfold.selectors.selection import Selection

ALL = 1 << 40
"""Units that nothing reaches: what is always read is not bounded by a budget."""


@dataclass(frozen=True)
class SomeHeads:
    """`heads` marks the KV heads that choose by `selection`; of the `others` nothing is remembered.

    These read their newest unit and the sinks and recent tokens of `others`, of all that they hold, whatever the budget
    of the choice is (the two kinds of heads of DuoAttention and LServe, arXiv:2410.10819, 2502.14866).
    Raises ValueError for heads that are no bools, and `open` where the layer has another number of heads.
    """

    selection: Selection
    heads: tuple[bool, ...]
    others: Always = field(default_factory=Always)
    far = 0
    slots = False

    def __post_init__(self) -> None:
        given: object = self.heads  # of a file
        heads = given if isinstance(given, tuple) else ()
        if not heads or any(type(head) is not bool for head in heads):
            raise ValueError(f"heads={shown(given)} must be a bool for each KV head")
        if self.selection.slots or self.selection.far or self.selection.vote.layer:
            raise ValueError(f"selection={self.selection} is of all heads together, and some have none")

    @property
    def index(self) -> "IndexOfHeads":
        """What the heads that choose go by."""
        return IndexOfHeads(self.selection.index, self.heads)

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.selection.unit

    @property
    def reuses(self) -> bool:
        """Whether what was chosen may be read again."""
        return self.selection.reuses

    def nbytes_with(self, spec: Spec, units: int) -> int:
        """See `Selecting.nbytes_with`."""
        return self.selection.nbytes_with(replace(spec, heads=sum(self.heads)), units)

    def chooses(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> Bool[np.ndarray, "B H"]:
        """See `Chooser.chooses`; the others' part is no choice."""
        some: np.ndarray = self.selection.chooses(counts, seen) & np.array(self.heads)
        return some

    def choose(
        self, remembered: Remembered, q: Float[Tensor, "B H G D"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"], last: Picked | None = None,
    ) -> tuple[Chosen | None, Picked | None]:  # fmt: skip
        """See `Chooser.choose`; what is handed in the next time is of the heads that choose."""
        assert isinstance(remembered, RememberedOfHeads)
        mask, units = np.array(self.heads), -(-counts // self.unit)
        number = int(units.max(initial=0))
        chosen, picked = None, None
        if mask.any():
            asking = q[:, torch.from_numpy(mask).to(q.device)]
            chosen, picked = self.selection.choose(remembered.inner, asking, counts[:, mask], seen, last)
        there = np.arange(number) < units[..., None]
        always = self.others.units(self.unit, units, np.full(len(units), ALL))
        if chosen is None and (always | ~there)[:, ~mask].all():
            return None, picked
        read = np.repeat(np.where(mask[:, None], there, always)[:, :, None], self.selection.vote.lists(q.shape[2]), 2)
        if chosen is not None:
            read[:, mask, :, : chosen.total] = chosen.mask
        return Chosen.of(read), picked


@dataclass(frozen=True)
class IndexOfHeads:
    """`index` of the KV heads that `heads` marks; the others' tokens it does not hear of."""

    index: Index
    heads: tuple[bool, ...]

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.index.unit

    @property
    def enough(self) -> int:
        """See `Index.enough`."""
        return self.index.enough

    @property
    def turns(self) -> bool:
        """See `Indexed.turns`."""
        return bool(getattr(self.index, "turns", False))

    def open(self, spec: Spec) -> "RememberedOfHeads":
        """Raises ValueError where the layer has another number of KV heads."""
        return RememberedOfHeads(self, self.index.open(self._of(spec)))

    def check(self, spec: Spec, tensors: Mapping[str, Tensor], counts: Int[np.ndarray, "B H"]) -> None:
        """See `Index.check`."""
        some = self._of(spec)
        self.index.check(some, tensors, counts[:, np.array(self.heads)])

    def restore(self, spec: Spec, tensors: Mapping[str, Tensor]) -> "RememberedOfHeads":
        """See `Index.restore`."""
        return RememberedOfHeads(self, self.index.restore(self._of(spec), tensors))

    def _of(self, spec: Spec) -> Spec:
        if spec.heads != len(self.heads):
            raise ValueError(f"heads={self.heads} must be of the {spec.heads} KV heads of layer {spec.layer}")
        return replace(spec, heads=sum(self.heads))


class RememberedOfHeads:
    """`inner` has the marked heads alone, one after the other."""

    def __init__(self, recipe: IndexOfHeads, inner: Remembered):
        self.recipe, self.inner = recipe, inner

    @property
    def mask(self) -> Bool[np.ndarray, " H"]:
        """Which heads are marked."""
        return np.array(self.recipe.heads)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Remembered.columns`."""
        return self.inner.columns

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def nbytes_with(self, units: int) -> int:
        """See `Remembered.nbytes_with`."""
        return self.inner.nbytes_with(units)

    def row_nbytes(self) -> np.ndarray:
        return self.inner.row_nbytes()

    def extend(self, tokens: Chunk, start: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.extend`."""
        if not self.mask.any():
            return
        self.inner.extend(self._some(tokens), start[:, self.mask])

    def _some(self, tokens: Chunk) -> Chunk:
        """The tokens of the marked heads."""
        some = torch.from_numpy(self.mask).to(tokens.valid.device)
        columns = {name: column[:, some] for name, column in tokens.columns.items()}
        keys, values = lambda: tokens.keys[:, some], lambda: tokens.values[:, some]
        return LateChunk(keys, values, tokens.valid[:, some], columns)

    def learn(self, tokens: Callable[[], Chunk], which: Bool[np.ndarray, "B H"]) -> None:
        """See `Remembered.learn`."""
        self.inner.learn(lambda: self._some(tokens()), which[:, self.mask])

    def unlearn(self, limit: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.unlearn`."""
        self.inner.unlearn(limit[:, self.mask])

    def forget(self, units: Int[np.ndarray, "B H"]) -> None:
        """See `Remembered.forget`."""
        self.inner.forget(units[:, self.mask])

    def cropped(self, rows: Bool[np.ndarray, " B"]) -> None:
        """See `Remembered.cropped`."""
        self.inner.cropped(rows)

    def whole(self) -> Bool[np.ndarray, " B"]:
        """See `Remembered.whole`."""
        return self.inner.whole()

    def begins(self, first: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
        """See `Remembered.begins`; of the others nothing is given again."""
        start: np.ndarray = first.copy()
        start[:, self.mask] = self.inner.begins(first[:, self.mask])
        return start

    def asks(self, q: Float[Tensor, "B H G D"], seen: Int[np.ndarray, " B"]) -> Float[Tensor, "B H G D"]:
        """See `Remembered.asks`; of the marked heads."""
        return self.inner.asks(q, seen)

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        """See `Remembered.scores`; of the marked heads."""
        return self.inner.scores(asked, units)

    def select(self, rows: np.ndarray) -> "RememberedOfHeads":
        """See `Remembered.select`."""
        return RememberedOfHeads(self.recipe, self.inner.select(rows))

    def join(self, other: Any) -> None:
        """See `Remembered.join`."""
        self.inner.join(other.inner)

    def clear(self) -> None:
        self.inner.clear()

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()


register("some-heads", SomeHeads)
