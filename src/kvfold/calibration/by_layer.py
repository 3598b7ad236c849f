"""Training layer by layer beside a frozen model: each learns alone, from what it sees in passes of the full model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from kvfold.calibration.run import Run
from kvfold.hf.cache import Cache
from kvfold.views import LayerView


class ByLayer:
    """Weights of all layers by name, and an optimiser (Adam) for each layer."""

    def __init__(self, layers: Sequence[dict[str, nn.Parameter]], rate: float):
        self.layers, self.rate = list(layers), rate
        self.adams = [torch.optim.Adam(layer.values(), lr=rate) for layer in self.layers]

    def slow_down(self, done: float) -> None:
        """Set the rate for a training of which so much is done, 0 to 1: in the last third it falls to a tenth."""
        for adam in self.adams:
            for group in adam.param_groups:
                group["lr"] = self.rate * min(1.0, max(0.1, 3.0 * (1.0 - done)))

    def descend(self, ordinal: int, loss: Tensor) -> None:
        """A step of one layer."""
        self.adams[ordinal].zero_grad()
        torch.autograd.backward(loss)
        self.adams[ordinal].step()

    def stacked(self) -> dict[str, Tensor]:
        """All layers' weights (L, ...) by name, on the CPU: layers may lie on several devices."""
        return {name: torch.stack([layer[name].detach().cpu() for layer in self.layers]) for name in self.layers[0]}


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """In this block the model's weights take no gradient."""
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for weight, grad in wanted:
            weight.requires_grad_(grad)


def views_of(run: Run, ids: Int[Tensor, "1 T"]) -> list[LayerView]:
    """What each paged layer sees of a text, by the full model."""
    views: list[LayerView] = []
    cache = Cache(run.model, "full", part_size=0)
    with torch.no_grad(), cache.observed(views.append):
        run.model(ids.to(run.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return views
