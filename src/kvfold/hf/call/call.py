"""One call of a model: what belongs to it, from the hook before its forward to the one behind it."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from kvfold.hf.call.reading import Reading
from kvfold.layer.parts import Parts
from kvfold.layer.plan import Plan
from kvfold.views import Images


@dataclass
class Call:
    """A call of the model with a cache; between calls one that never began, for passes that no hook tells of."""

    marks: tuple[Any, ...] | None = None
    """How far each layer had read when it began; None: it did not begin."""
    after: Reading | None = None
    """The cache's reading when it is over."""
    ids: Int[Tensor, "B Q"] | None = None
    """What it was given, padding unknown."""
    chunks: tuple[nn.Module, list[Tensor]] | None = None
    """A module whose call was split, and its outputs so far."""
    token_ids: Int[Tensor, "B Q"] | None = None
    """What the pass in hand reads."""
    mask: Tensor | None = None
    """The padding mask (B, W) over all columns read so far."""
    images: Images | None = None
    """Which tokens of the pass stand for images."""
    plan: Plan | None = None
    """The forward pass in hand."""
    at: int = -1
    """The last paged layer that attended in it."""
    part: int = 0
    """Tokens of the parts in which the layers read the pass; 0: all at once."""
    asked: bool = False
    """Whether `part` was set for the pass that comes, by whoever calls the body itself."""
    parts: Parts | None = None
    """The tokens of the layer that reads in parts at the moment."""
    through: int = 0
    """Layers that are through with the pass, where it is read in parts."""
    unread: Any = None
    """The layer that got keys which no attention function has seen yet."""


def greedy_of(output: Any, plan: Plan) -> Int[Tensor, "B K"] | None:
    """What a model would say after the last columns of a pass: of all of them, where the last may not be the text's."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return None
    padded = plan.narrow is None and plan.mask is not None and not bool(plan.mask[:, -1].all())
    every = plan.defer or padded
    chosen: Tensor = (logits if every else logits[:, -1:]).detach().argmax(-1)
    return chosen
