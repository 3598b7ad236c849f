"""What a model's keys and values mean: the fields and weights by which a file knows its model."""

import hashlib
import json
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvfold.artefacts.fields import cache_fields
from kvfold.artefacts.weights import sample


def fields_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a cache's model must have in common with the one that reads it, by name, as JSON has it."""
    return cache_fields(model)


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the fields and of a sample of all weights, those of the adapters in use among them, on any device.

    Cheap, not a proof: weights that differ elsewhere only are taken for the same.
    """
    digest = hashlib.sha256(json.dumps(fields_of(model), sort_keys=True).encode())
    sample(digest, model)
    return digest.hexdigest()


def modules_of(model: PreTrainedModel, index: int) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "layer_idx", None) == index]
