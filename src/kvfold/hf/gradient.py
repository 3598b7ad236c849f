"""Gradients: what a cache stores has none, so one that would come through it is refused, not left out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INSTEAD = (
    "a kvfold cache is for inference: for a gradient read the text without it (transformers' DynamicCache has "
    "gradients, of the text that is not in it yet)"
)


class Refused(torch.autograd.Function):
    """What a paged layer gives, so that a gradient which comes back to it is not lost without a word."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, layer: str, *inputs: Tensor) -> Tensor:
        """`out` as it is; `inputs`: those of the attention, of which some want a gradient."""
        ctx.layer = layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Raises RuntimeError."""
        raise RuntimeError(f"no gradient comes through {ctx.layer}: {INSTEAD}")


def without_gradient(out: Tensor, layer: str, *inputs: Tensor) -> Tensor:
    """`out` of an attention whose `inputs` were detached; backward through it raises RuntimeError naming `layer`."""
    refusing: Tensor = Refused.apply(out, layer, *inputs)  # type: ignore[no-untyped-call]
    return refusing


def refuse_gradient(kwargs: Mapping[str, Any]) -> None:
    """ValueError where a call's embeddings can only be there for the sake of a gradient: a leaf that wants one."""
    given = kwargs.get("inputs_embeds")
    if isinstance(given, Tensor) and torch.is_grad_enabled() and given.requires_grad and given.is_leaf:
        raise ValueError(
            f"inputs_embeds.requires_grad=True must be False, or the call under torch.no_grad(): {INSTEAD}"
        )
