"""Running a model to learn about it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from kvfold.hf.tables import kept_tables


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Within the block a model runs as in inference, and what it does leaves no trace in it."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), kept_tables(model):
            for module in training:
                module.training = False
            yield
    finally:
        for module in training:
            module.training = True


def has_weights(model: nn.Module) -> bool:
    """Whether a model can run: its weights are there, or accelerate brings them."""
    weights = list(model.parameters())
    return not any(w.is_meta for w in weights) or any(hasattr(module, "_hf_hook") for module in model.modules())
