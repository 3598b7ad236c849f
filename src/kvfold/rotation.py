"""Moving keys and queries along the text by rotating them further (RoPE), for methods with compact positions."""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Rope(Protocol):
    """A model's rotary embedding."""

    def shift(self, x: Float[Tensor, "B H T D"], steps: Int[Tensor, "B H T"]) -> Float[Tensor, "B H T D"]:
        """Vectors rotated for position p become those for position p + steps."""
        ...


@runtime_checkable
class Measured(Protocol):
    """What was measured on a model for a format."""

    @property
    def key(self) -> str:
        """By which the format finds it (`Spec.artefact`)."""
        ...

    def of_layer(self, ordinal: int, rope: Rope | None) -> Any:
        """That of a layer, by its place among the paged ones. Raises ValueError where it does not fit the layer."""
        ...


@runtime_checkable
class Frame(Measured, Protocol):
    """What queries and keys are brought to before they attend, from what the model's rotation made of them."""

    def enter(
        self, x: Float[Tensor, "B H T D"], positions: Int[Tensor, "B T"], ordinal: int, rope: Rope | None
    ) -> Float[Tensor, "B H T D"]:
        """Queries or keys of a layer, which the model has rotated for these positions, as they attend."""
        ...


@dataclass(frozen=True)
class Still:
    """The rotation of a layer whose keys say nothing of positions: none."""

    def shift(self, x: Float[Tensor, "B H T D"], steps: Int[Tensor, "B H T"]) -> Float[Tensor, "B H T D"]:
        """The same vectors."""
        return x


@dataclass(frozen=True)
class Compact:
    """Slots are numbered 0, 1, 2, ... whatever text positions they hold, as StreamingLLM does (arXiv:2309.17453).

    Keys stay stored as the model rotated them and turn on every read, from that one original: no drift in bf16.
    """

    rope: Rope
    slots: Int[Tensor, "B H T"] | None = None
    """Where each key stands; None: in the order in which they are stored."""
    rows: Bool[Tensor, " B"] | None = None
    """The rows of the batch that are read so; None: all. The others' vectors stay as they are."""
    least: Int[Tensor, " B"] | None = None
    """Text positions at which keys that come before them stand, all others at their own; None: they stand at slots."""

    def of(self, start: int, stop: int) -> "Compact":
        """For a segment that holds the stored tokens `start` to `stop`."""
        return self if self.slots is None else replace(self, slots=self.slots[..., start:stop])

    def rotate_keys(
        self, keys: Float[Tensor, "B H T D"], positions: Int[Tensor, "B H T"], ranks: Int[Tensor, "B H T"]
    ) -> Float[Tensor, "B H T D"]:
        """Each key as if it stood at its slot; `ranks`: the how-manieth stored token each is."""
        slots = ranks if self.slots is None else self.slots
        if self.least is not None:
            slots = positions.maximum(self.least[:, None, None].to(positions.dtype))
        return self.rope.shift(keys, self._of_rows(slots.to(positions.dtype) - positions))

    def rotate_queries(
        self, q: Float[Tensor, "B H G Q D"], first: Int[Tensor, "B 1"], first_slot: Int[Tensor, "B H"]
    ) -> Float[Tensor, "B H G Q D"]:
        """Each query as far behind `first_slot`, which is behind the row's stored tokens, as it is behind `first`.

        `first`: where the pass that it belongs to begins in the text.
        """
        b, h, g, n, d = q.shape
        steps = self._of_rows(first_slot[:, :, None] - first[:, None])  # the same for all queries of a row
        steps = steps[:, :, None].expand(b, h, g, n).reshape(b, h, g * n)
        return self.rope.shift(q.reshape(b, h, g * n, d), steps).view(b, h, g, n, d)

    def _of_rows(self, steps: Int[Tensor, "B H T"]) -> Int[Tensor, "B H T"]:
        return steps if self.rows is None else steps.masked_fill(~self.rows[:, None, None], 0)
