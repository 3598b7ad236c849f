"""A linear layer by its definition, in float32."""

from torch import Tensor

from kvfold.ops.dispatch import register


@register("linear", "naive", rank=0)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)
