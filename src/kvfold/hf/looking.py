"""Running a model to learn about it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kvfold.artefacts.weights import movers
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
    return not any(w.is_meta for w in weights) or is_offloaded(model)


def is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate has a hand in how a model runs: it may bring weights for a pass, and take them away again."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def device_of(*modules: nn.Module) -> torch.device:
    """Where the first of these computes: where its weights are, or where accelerate brings them. "cpu" if none says."""
    for module in modules:
        for weight in module.parameters():
            if not weight.is_meta:
                return weight.device
        for mover in (mover for part in module.modules() for mover in movers(part)):
            where = getattr(mover, "execution_device", None)
            if where is not None:
                return torch.device(where)
    return torch.device("cpu")


def ids_device(model: Any) -> torch.device:
    """Where token ids for a model belong; `model.device` is "meta" where the weights are brought for a pass only."""
    return device_of(model.get_input_embeddings())
