"""What a method's late events see: layers that are done, a prompt to read on, and one that nobody has read."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

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

    def __getitem__(self, ordinal: int) -> LayerView:
        """The view of a layer that is done, by its place among the paged layers."""
        ...

    def __len__(self) -> int: ...


@runtime_checkable
class PromptView(CacheView, Protocol):
    """What `after_prompt` sees: the stored tokens of every layer, the prompt's ids, and the words around it."""

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


@dataclass(frozen=True)
class ReadOn:
    """Run `ids` through the model as if they came next; `observe` gets every layer's view, then they are gone.

    Answered with None.
    """

    ids: Int[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]
    observe: Callable[[LayerView], None]


@dataclass(frozen=True)
class LookAhead:
    """At most `count` tokens that come next, greedily; `draft`: said by another model, its name or folder.

    Answered with the tokens (B, N), and which of them count (B, N).
    """

    count: int
    draft: str | None = None


T = TypeVar("T")
Requests = Generator[ReadOn | LookAhead, Any, T]
"""Work on a prompt that asks for readings of it as it goes on (`yield ReadOn(...)`), and ends with a T."""


@runtime_checkable
class Reader(Protocol):
    """Whoever has the model, and answers requests."""

    def look_ahead(self, count: int, draft: str | None = None) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """The answer to a `LookAhead`."""
        ...

    def read(self, ids: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"], observe: Callable[[LayerView], None]) -> None:
        """Do what a `ReadOn` asks for."""
        ...


def answered(work: T | Requests[T], reader: Reader) -> T:
    """What `work` ends with, its requests answered one by one by `reader`; what asks for nothing is the end itself."""
    if not isinstance(work, Generator):
        return work
    answer: Any = None
    while True:
        try:
            request = work.send(answer)
        except StopIteration as end:
            found: T = end.value
            return found
        answer = None
        if isinstance(request, ReadOn):
            reader.read(request.ids, request.valid, request.observe)
        elif isinstance(request, LookAhead):
            answer = reader.look_ahead(request.count, request.draft)
        else:
            raise TypeError(f"request={request!r} is not one of ReadOn, LookAhead")


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
        self, count: int, observe: Callable[[LayerView], None], draft: str | None = None
    ) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """As a prompt's: `observe` gets the views of the passes, which are over a text without padding inside it."""
        ...
