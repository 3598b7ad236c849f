"""Where in the model and in the text a view stands, and what stands before a layer's attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.rotation import Rope
from kvfold.views.queries import Images


@dataclass(frozen=True)
class Site:
    """A layer that is on pages: what stays the same of it as long as its cache lives."""

    layer: int
    """Index among the model's layers."""
    ordinal: int
    """Index among the layers that the cache holds on pages; budgets are split over those."""
    paged: tuple[int, ...]
    """Model indices of all layers that are on pages."""
    depth: int
    """Layers of the model."""
    rope: Rope | None = None


@dataclass(frozen=True)
class NewWords:
    """What `label` sees: a pass's tokens as words, before any of them is stored."""

    token_ids: Int[Tensor, "B Q"] | None
    valid: Bool[Tensor, "B Q"]
    """Which of them are not padding."""
    newest: Callable[[str], Int[Tensor, " B"]]
    """The largest number of a column among each row's tokens that are stored, -1 where there is none."""
    ends: Callable[[], Bool[Tensor, " V"] | None]
    """With which tokens of the model's vocabulary a sentence ends, for methods that ask for "sentence_ends"."""

    def ids(self, who: object) -> Int[Tensor, "B Q"]:
        """The tokens. Raises ValueError, for `who` needs them, where the pass brings embeddings alone."""
        if self.token_ids is None:
            raise ValueError(f"method={who} must know the tokens of a text: give input_ids")
        return self.token_ids


@dataclass(frozen=True)
class Place:
    """Where in the model and in the text a view stands."""

    layer: int
    """Index among the model's layers."""
    ordinal: int
    """Index among the layers that the cache holds on pages; budgets are split over those."""
    paged: tuple[int, ...]
    """Model indices of all layers that are on pages."""
    depth: int
    """Layers of the model."""
    scale: float
    prompt: Int[Tensor, " B"]
    """Tokens that each row had read by the end of its last prompt: what a budget is a fraction of."""
    seen: Int[Tensor, " B"]
    """Tokens that each row has read, generated ones too."""
    module: Any = None
    rope: Rope | None = None
    """What turns this layer's keys (`kvfold.rotation.Still`: nothing); None: that is not known."""
    compact: bool = False
    """Whether the pass read keys at compact positions; scores are taken at text positions all the same."""
    step: dict[str, Any] = field(default_factory=dict)
    """Shared by the layers of one forward pass, dropped when it ends."""
    token_ids: Int[Tensor, "B Q"] | None = None
    images: Images | None = None
    """None: the model reads no images, or the pass brought no ids."""

    @property
    def layers(self) -> int:
        """How many layers share a budget."""
        return len(self.paged)

    def ordinals(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Model layers (negative: from the end) as places among the paged ones; those that are not paged fall out."""
        wanted = {layer % self.depth for layer in layers if -self.depth <= layer < self.depth}
        return tuple(i for i, layer in enumerate(self.paged) if layer in wanted)


@dataclass(frozen=True)
class HiddenView:
    """What `Method.admit` sees: a prompt's new tokens as they enter one layer's attention, before it runs."""

    states: Float[Tensor, "B Q C"]
    """The hidden states that the attention module gets."""
    valid: Bool[Tensor, "B Q"]
    """Which of them are not padding."""
    positions: Int[Tensor, "B Q"]
    heads: int
    """KV heads."""
    place: Place
