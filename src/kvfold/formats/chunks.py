"""What a chunk of keys is like: their mean, and how far the one that is least like it lies from that (ShadowKV)."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.ops.attend import blocked

LEAST = 1e-300
"""Norms are no less: a key of zeros is like nothing."""


def chunk_means(keys: Float[Tensor, "B H T D"], unit: int) -> tuple[Float[Tensor, "B H N D"], Float[Tensor, "B H N"]]:
    """Of each whole chunk of `unit` keys their mean, and the least cosine that one of them has with it.

    In the keys' dtype, rounded once from float64: whoever works them out of the same keys gets the same numbers,
    whether they came one by one or together, so that what is decided by their order is decided alike everywhere.
    """
    whole = keys.shape[2] // unit
    b, h, _, d = keys.shape
    chunks = keys[:, :, : whole * unit].reshape(b, h, whole, unit, d)
    step = max(1, blocked.BLOCK_ELEMENTS // max(1, chunks[:, :, :1].numel()))
    parts = [_means(some.double()) for some in torch.split(chunks, step, 2)] if whole else [_means(chunks.double())]
    means, alike = (torch.cat(found, 2).to(keys.dtype) for found in zip(*parts, strict=True))
    return means, alike


def _means(chunks: Float[Tensor, "B H N C D"]) -> tuple[Float[Tensor, "B H N D"], Float[Tensor, "B H N"]]:
    means = chunks.mean(3)
    norms = chunks.norm(dim=-1).clamp(min=LEAST) * means.norm(dim=-1).clamp(min=LEAST)[..., None]
    cosines = (chunks * means[..., None, :]).sum(-1) / norms
    return means, cosines.clamp(-1.0, 1.0).amin(-1)
