"""What a method's late events see: layers that are done, a prompt to read on, and one that nobody has read."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.views.layer_view import LayerView


@runtime_checkable
class CacheView(Protocol):
    """What `after_layer` and `after_forward` see: the stored tokens of every layer that is done."""

    @property
    def prefill(self) -> bool:
        """Whether the forward pass read a prompt (more than one token, or the first)."""
        ...

    @property
    def step(self) -> dict[str, Any]:
        """The context shared by the layers of this forward pass."""
        ...

    def __getitem__(self, ordinal: int) -> "LayerView":
        """The view of a layer that is done, by its place among the paged layers."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class PromptView(CacheView, Protocol):
    """What `after_prompt` sees: the stored tokens of every layer, the prompt's ids, and the model to read on."""

    @property
    def ids(self) -> Int[Tensor, "B Q"]:
        """The tokens that this pass read."""
        ...

    @property
    def valid(self) -> Bool[Tensor, "B Q"]:
        """Which of them are not padding."""
        ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; none where the model has no tokenizer beside its weights."""
        ...

    def answer(self) -> list[int]:
        """What the model's chat template puts between a user's words and the answer, as tokens."""
        ...

    def look_ahead(self, count: int, draft: str | None = None) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """At most `count` tokens that come next, greedily, and which of them count; `draft`: another model's name."""
        ...

    def read(self, ids: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"], observe: Callable[["LayerView"], None]) -> None:
        """Run `ids` through the model as if they came next; `observe` gets every layer's view, then they are gone."""
        ...


@runtime_checkable
class RawPrompt(Protocol):
    """What `read_order` sees: a prompt that no layer has seen yet."""

    @property
    def ids(self) -> Int[Tensor, "B Q"]:
        """Its tokens."""
        ...

    @property
    def valid(self) -> Bool[Tensor, "B Q"]:
        """Which of them are not padding."""
        ...

    @property
    def model(self) -> Any:
        """The model that is to read it."""
        ...

    def look_ahead(
        self, count: int, observe: Callable[["LayerView"], None], draft: str | None = None
    ) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """As a prompt's: `observe` gets the views of the passes, which are over a text without padding inside it."""
        ...
