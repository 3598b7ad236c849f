"""Which weights a model has, told by a sample of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SAMPLES = 256
"""Numbers of each weight that are looked at."""


def sample(digest: Any, module: Any) -> None:
    """Give `digest` (of `hashlib`) the names, shapes and dtypes of a module's weights, and numbers of each.

    On any device; of weights that are elsewhere (on "meta") no numbers. Cheap, not a proof.
    """
    for name, weight in module.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _parts(weight.detach()):
            flat = part.reshape(-1)
            some = flat[:: max(1, len(flat) // SAMPLES)].cpu().contiguous()
            digest.update(some.view(torch.uint8).numpy().tobytes())


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """What a weight is made of: quantised ones, of packages that make them a type of tensor, of several."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
    elif not weight.is_meta:
        yield weight
