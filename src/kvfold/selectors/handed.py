"""A choice that one layer makes for those behind it, by the attention that it pays itself (DELTA)."""

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import Chosen, Handed, Index, Remembered, Spec, register
from kvfold.options import check_int
from kvfold.selectors.held import nothing
from kvfold.selectors.selection import Selection
from kvfold.selectors.unremembered import Unremembered, UnrememberedOf


class OfAPass:
    """What a choice is that lives as long as a pass: of all heads, of tokens where they stand, and never used again."""

    heads = None
    far = 0
    slots = reuses = False

    @property
    @abstractmethod
    def index(self) -> Index:
        """What it goes by."""

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.index.unit

    def nbytes_with(self, spec: Spec, units: int) -> int:
        """See `Selecting.nbytes_with`."""
        return 0


@dataclass(frozen=True)
class Gives(OfAPass):
    """Model layer `layer` reads everything, and chooses by `selection` what layers that take it of this one read.

    A token is worth the most that any query head of the layer pays it, a unit the sum over its tokens (DELTA,
    arXiv:2510.09883); of `selection` the budget counts, and what is always read. All heads read the same.
    Raises ValueError for a selection of another index than `Unremembered`, of several lists, or one that reuses.
    """

    layer: int
    selection: Selection

    def __post_init__(self) -> None:
        check_int("layer", self.layer, 0)
        if not isinstance(self.selection.index, Unremembered) or self.selection.reuses or self.selection.slots:
            raise ValueError(f"selection={self.selection} must go by nothing that is remembered")

    @property
    def index(self) -> Unremembered:
        """Of nothing."""
        assert isinstance(self.selection.index, Unremembered)
        return self.selection.index

    def looks(self, counts: Int[np.ndarray, "B H"], seen: Int[np.ndarray, " B"]) -> bool:
        """See `Giving.looks`. Raises ValueError where heads hold other tokens."""
        if (counts != counts[:, :1]).any():
            raise ValueError(f"layer {self.layer} chooses for all heads together; they hold {counts.tolist()} tokens")
        return bool(self.selection.chooses(counts, seen).any())

    def give(
        self, got: Float[Tensor, "B H G T"], unit: Int[Tensor, "B H T"], counts: Int[np.ndarray, "B H"],
        seen: Int[np.ndarray, " B"], handed: Handed,
    ) -> None:  # fmt: skip
        """See `Giving.give`."""
        place = unit[:, 0]  # all heads hold the same tokens
        token = got.amax((1, 2)).masked_fill(place < 0, 0.0)
        number = -(-int(counts.max(initial=0)) // self.unit)
        worth = token.new_zeros(len(token), number).scatter_add_(1, place.clamp(min=0), token)
        one = got[:, :1, :1, :1]
        chosen, _ = self.selection.choose(_Worth(self.index, worth), one, counts[:, :1], seen)
        handed[self] = counts.copy(), chosen


class _Worth(UnrememberedOf):
    """What units are worth, as if an index had said it."""

    def __init__(self, recipe: Unremembered, worth: Float[Tensor, "B N"]):
        spec = Spec(len(worth), 1, 1, 1, worth.dtype, worth.device)
        super().__init__(recipe, spec, nothing(spec, 0))
        self.worth = worth

    def scores(self, asked: Float[Tensor, "B H G D"], units: Int[np.ndarray, "B H"]) -> Float[Tensor, "B H G N"]:
        return self.worth[:, None, None]


@dataclass(frozen=True)
class Takes(OfAPass):
    """Reads what the layer `of` has chosen in this forward pass; everything, where none such has been there.

    A layer by itself thus attends in full. Nothing of a choice is kept beyond the pass.
    """

    of: Gives

    def __post_init__(self) -> None:
        if not isinstance(self.of, Gives):
            raise ValueError(f"of={self.of!r} must be what a layer gives")

    @property
    def index(self) -> Unremembered:
        """Of nothing."""
        return self.of.index

    def take(self, counts: Int[np.ndarray, "B H"], handed: Handed, remembered: Remembered) -> Chosen | None:
        """See `Taking.take`."""
        held, chosen = handed.get(self.of, (counts, None))
        if not np.array_equal(held, counts):
            raise ValueError(
                f"layer {self.of.layer} has chosen among {held.tolist()} tokens, and a layer that reads its choice "
                f"holds {counts.tolist()}"
            )
        return None if chosen is None else chosen.of_heads(np.zeros(counts.shape[1], dtype=np.int64))


register("gives", Gives)
register("takes", Takes)
