"""A call of the model that never came to its end: what the cache still knows, and whether it can go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from kvfold.hf.call.rewriting import Reading
from kvfold.hf.layers import PagedLayer, tensors
from kvfold.layer.plan import Pass

if TYPE_CHECKING:
    from kvfold.hf.cache import Cache


@dataclass(frozen=True)
class Begun:
    """A call of the model as it began."""

    marks: tuple[Any, ...]
    """How far each layer had read."""
    reading: Reading | None
    """The cache's when the call is over."""


def begin(cache: "Cache", reading: Reading | None) -> Begun:
    """The call that begins now."""
    return Begun(tuple(map(_mark, cache.layers)), reading)


@contextmanager
def end(cache: "Cache") -> Iterator[None]:
    """Within the block the call is over and its tokens count, unless the block fails, which does what is left."""
    begun, cache._begun = cache._begun, None
    if begun is not None:
        cache.reading = begun.reading
    try:
        yield
    except BaseException:
        cache._begun = begun
        raise


def forgive(cache: "Cache") -> None:
    """Forget a call that failed before any layer had stored its tokens.

    Raises RuntimeError where some layers hold tokens of a call that failed: what they dropped for them is gone.
    """
    begun = cache._begun
    if begun is None:
        return
    if tuple(map(_mark, cache.layers)) != begun.marks:
        raise RuntimeError(
            "the last call of the model with this cache failed when layers had already stored its tokens: "
            "call cache.reset() and read the text again"
        )
    cache._begun, cache._pass, cache.unread = None, None, None


def _mark(layer: Any) -> Any:
    if isinstance(layer, PagedLayer):
        return layer.core.width
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.cumulative_length
    return tuple((id(state), state._version) for state in tensors(layer) if not state.is_inference())


def greedy_of(output: Any, this: Pass) -> Int[Tensor, "B K"] | None:
    """What a model would say after the last columns of a pass: of all of them, where the last may not be the text's."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return None
    padded = this.narrow is None and this.mask is not None and not bool(this.mask[:, -1].all())
    every = this.defer or padded
    chosen: Tensor = (logits if every else logits[:, -1:]).detach().argmax(-1)
    return chosen
