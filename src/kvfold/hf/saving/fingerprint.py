"""What a model's keys and values mean: the fields and weights by which a file knows its model."""

import hashlib
import json
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvfold.artefacts.fields import fields_for
from kvfold.artefacts.weights import sample


def fields_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a cache's model must have in common with the one that reads it, by name, as JSON has it."""
    found = fields_for("cache", model) | {"dtype": str(model.dtype)}
    plain: dict[str, Any] = json.loads(json.dumps(found, sort_keys=True, default=str))
    return plain


def fingerprint(model: PreTrainedModel, paged: list[int]) -> str:
    """SHA-256 of the fields and of a sample of weights, on any device: the input embedding, first and last paged layer.

    Cheap, not a proof: weights that differ elsewhere only are taken for the same.
    """
    digest = hashlib.sha256(json.dumps(fields_of(model), sort_keys=True).encode())
    parts = [model.get_input_embeddings(), *(m for index in paged[:1] + paged[-1:] for m in modules_of(model, index))]
    for part in parts:
        sample(digest, part)
    return digest.hexdigest()


def modules_of(model: PreTrainedModel, index: int) -> list[nn.Module]:
    return [module for module in model.modules() if getattr(module, "layer_idx", None) == index]
