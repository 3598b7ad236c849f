"""Linear layers for few rows, the fastest of several ways by what they take in the model itself.

A decode step reads every weight for a few rows, and what torch does then differs much by processor, dtype and number of
rows. Layers of one shape take turns with the ways at first, each timed where it is used, with weights that come from
memory as they always do; from then on all take the fastest. No weight is copied.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as by_torch

from kvfold.hf.traced import Numbered, operator
from kvfold.ops.cpu import FLOATS, library, widths_fit
from kvfold.ops.linear.cpu import linear as by_kvfold

ROWS = 16
"""From more rows on torch's product is used: weights are then read for many, and arithmetic is what takes time."""
TRIES = 5
"""Calls of a shape that each way is timed in; the fastest of them counts, as the others met other programs."""


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = (weight @ x.T).T.contiguous()
    return out if bias is None else out + bias


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "torch": by_torch,
    "transposed": _transposed,
    "kvfold": by_kvfold,
}


def ways() -> list[str]:
    """Those that this installation has."""
    return [name for name in WAYS if name != "kvfold" or library() is not None]


Shape = tuple[int, int, torch.dtype, int, int]
"""Outputs, inputs, dtype, rows, threads: what a choice is for."""


_choices = Numbered()


@dataclass(eq=False)
class Choices:
    """Seconds that each way took, by shape, and the one that is taken since all had their turns."""

    seconds: dict[Shape, dict[str, list[float]]] = field(default_factory=dict)
    chosen: dict[Shape, str] = field(default_factory=dict)
    number: int = field(init=False)
    """What graphs know it by."""

    def __post_init__(self) -> None:
        self.number = _choices.number(self)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """A layer's output for a few rows (N, K)."""
        shape = (*weight.shape, x.dtype, len(x), torch.get_num_threads())
        way = self.chosen.get(shape)
        if way is not None:
            return WAYS[way](x, weight, bias)
        taken = self.seconds.setdefault(shape, {name: [] for name in ways()})
        way = min(taken, key=lambda name: len(taken[name]))
        start = time.perf_counter()
        out = WAYS[way](x, weight, bias)
        taken[way].append(time.perf_counter() - start)
        if all(len(each) >= TRIES for each in taken.values()):
            self.chosen[shape] = min(taken, key=lambda name: min(taken[name]))
        return out


def _like(x: Tensor, weight: Tensor, bias: Tensor | None, choices: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@operator("linear(Tensor x, Tensor weight, Tensor? bias, int choices) -> Tensor", _like)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, choices: int) -> Tensor:
    """What a graph calls for a layer; `choices` is the number of its model's."""
    found = _choices.find(choices)
    return by_torch(x, weight, bias) if found is None else found.run(x.contiguous(), weight, bias)


class FastLinear(nn.Linear):
    """A `torch.nn.Linear` that asks its choices for few rows; made of one in place, and made one again.

    Copies and pickles of it are plain layers.
    """

    def forward(self, input: Tensor) -> Tensor:
        choices: Choices | None = self.__dict__.get("kvfold_choices")
        if choices is None or not _plain(input, self.weight, self.bias):
            return nn.Linear.forward(self, input)  # not super(): another thread may have undone us meanwhile
        rows = input.numel() // self.weight.shape[1]
        if not 0 < rows <= ROWS:
            return nn.Linear.forward(self, input)
        few = input.reshape(rows, self.weight.shape[1])
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.kvfold.linear(few, self.weight, self.bias, choices.number)
        else:
            out = choices.run(few, self.weight, self.bias)
        return out.view(*input.shape[:-1], -1)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name != "kvfold_choices"}
        return _unmade, (), state


def _unmade() -> nn.Linear:
    """A layer before its state."""
    return nn.Linear.__new__(nn.Linear)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody but the layer looks at its product: no gradient, autocast, tracing, other device or dtype."""
    if torch.is_autocast_enabled("cpu") or (not torch.compiler.is_compiling() and _watched()):
        return False
    parts = [x, weight] if bias is None else [x, weight, bias]
    if any(part.device.type != "cpu" or part.dtype != x.dtype for part in parts) or x.dtype not in FLOATS:
        return False
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return False
    fit = type(x) in (Tensor, nn.Parameter) and x.shape[-1:] == weight.shape[1:] and weight.numel() > 0
    return fit and weight.is_contiguous()


def _watched() -> bool:
    """Whether a call is traced (torch.jit), mapped (vmap, jvp) or dispatched by somebody."""
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return traced or inside or bool(torch._C._len_torch_dispatch_stack())


def _known(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else: no subclass, no forward of its own, plain weights."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    plain = type(weight) is nn.Parameter and weight.layout == torch.strided and weight.is_contiguous()
    return plain and weight.device.type == "cpu" and weight.dtype in FLOATS and widths_fit(*weight.shape)


class fast_linears:
    """Let a model's linear layers take the fastest way for few rows; as a block, or until `undo()`.

        with kvfold.fast_linears(model):
            model.generate(...)

    Answers stay within the rounding of the dtype; prompts and gradients take torch's way as before; torch.compile makes
    each layer one operator, which takes the fastest way when the graph runs. What
    is no plain `torch.nn.Linear` on the CPU in float32, bfloat16 or float16 is left as it is. Raises ValueError for a
    model without such a layer, and for one that has them already.
    """

    def __init__(self, model: nn.Module):
        if any(type(module) is FastLinear for module in model.modules()):
            raise ValueError(f"model={type(model).__name__} has fast linear layers already; undo() those first")
        found: list[Any] = [module for module in model.modules() if _known(module)]
        if not found:
            raise ValueError(
                f"model={type(model).__name__} has no torch.nn.Linear on the CPU in float32, bfloat16 or float16"
            )
        self.choices = Choices()
        self.layers = found
        for layer in self.layers:
            layer.__class__ = FastLinear
            layer.kvfold_choices = self.choices

    def undo(self) -> None:
        """Make the layers what they were."""
        for layer in self.layers:
            plain: Any = nn.Linear
            if type(layer) is FastLinear:  # else somebody has made another kind of it, which goes on without choices
                layer.__class__ = plain
            if hasattr(layer, "kvfold_choices"):
                del layer.kvfold_choices
        self.layers = []

    def report(self) -> dict[Shape, str]:
        """The way that was chosen, by (outputs, inputs, dtype, rows, threads)."""
        return dict(self.choices.chosen)

    def __enter__(self) -> "fast_linears":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
