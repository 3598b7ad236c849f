"""TurboQuant's calibration: a basis of keys in which what queries make most of is coded best."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.calibration.run import Run
from kvfold.calibration.sensitivity import sample
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.views import LayerView

FLOOR = 1e-7
"""Of a matrix' largest eigenvalue: no other counts as less, so that directions that never vary have an inverse."""


@dataclass
class Moments:
    """E[x x'] of a layer's keys and queries, as they attend, summed over texts; float64."""

    keys: Float[Tensor, "H D D"]
    queries: Float[Tensor, "H D D"]


def turboquant_basis(run: Run) -> dict[str, Any]:
    """`turn` (L, H, D, D), float16, and `weight` (L, H, D): V and W of each paged layer and KV head, A = V W V'; and
    `channels` (L, H, D), the best A that is diagonal.

    A: see `balance`. Moments are those of rotated keys and queries, what a cache holds and is asked with, the first
    tokens' included. So texts should be about as long as those to come: within 512 tokens slow pairs of a rotation
    hardly turn, and a basis from there is no better than the random one for SmolLM2 at 1,024 (docs/LOG.md).
    """
    samples, length = run.sizes(8, 2048)
    layers = look(run, samples, length)
    made = torch.stack([balance(layer.keys, layer.queries) for layer in layers])
    channels = torch.stack([diagonal(layer.keys, layer.queries) for layer in layers])
    weight, turn = torch.linalg.eigh(made)
    run.about.update(floor=FLOOR, condition=[float(f"{x.max():.4g}") for x in weight.amax(-1) / weight.amin(-1)])
    return {"turn": turn.half().contiguous(), "weight": weight.float().contiguous(), "channels": channels.float()}


def balance(keys: Float[Tensor, "H D D"], queries: Float[Tensor, "H D D"]) -> Float[Tensor, "H D D"]:
    """A, symmetric, of mean eigenvalue 1: A'A = S_k^{-1/2} (S_k^{1/2} S_q S_k^{1/2})^{1/2} S_k^{-1/2}, float64.

    Of all matrices it has the least tr(A S_k A') tr(A^{-T} S_q A^{-1}): the mean squared error of logits, where that of
    a code is the same in all directions and grows with the vector.
    """
    root, inverse = power(keys, 0.5), power(keys, -0.5)
    made = power(inverse @ power(root @ queries.double() @ root, 0.5) @ inverse, 0.5)
    return made / made.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def diagonal(keys: Float[Tensor, "H D D"], queries: Float[Tensor, "H D D"]) -> Float[Tensor, "H D"]:
    """What `balance` is where A must be diagonal: (S_q / S_k)^{1/4} of each channel, of mean 1, float64."""
    energies = [x.double().diagonal(dim1=-2, dim2=-1) for x in (queries, keys)]
    most = [x.amax(-1, keepdim=True) for x in energies]
    q, k = (torch.where(m > 0, torch.maximum(x, m * FLOOR), 1.0) for x, m in zip(energies, most, strict=True))
    made = (q / k).pow(0.25)
    return made / made.mean(-1, keepdim=True)


def power(matrix: Float[Tensor, "H D D"], exponent: float) -> Float[Tensor, "H D D"]:
    """Of a symmetric positive matrix, its eigenvalues no less than `FLOOR` of the largest (1 where all are 0)."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT).double() / 2)
    most = values.amax(-1, keepdim=True)
    values = torch.where(most > 0, torch.maximum(values, most * FLOOR), 1.0)
    made: Tensor = (vectors * values.pow(exponent)[..., None, :]) @ vectors.mT
    return made


@torch.no_grad()
def look(run: Run, samples: int, length: int) -> list[Moments]:
    """Read `samples` windows of running text. Raises ValueError for numbers that are not finite."""
    rng = random.Random(run.seed)
    found: list[Moments] = []
    for number in range(samples):
        run.tick(f"text {number + 1} of {samples}")
        ids, cache = sample(run, rng, length), Cache(run.model, "full")

        def observe(view: LayerView) -> None:
            layer, seen = view.place.ordinal, of_view(view)
            if layer == len(found):
                found.append(seen)
            else:
                found[layer].keys += seen.keys
                found[layer].queries += seen.queries

        with cache.observed(observe):
            run.model(ids.to(run.model.device), logits_to_keep=1, **with_cache(run.model, cache))
    for layer, each in enumerate(found):
        if not bool((each.keys.isfinite() & each.queries.isfinite()).all()):
            raise ValueError(f"layer {layer} on pages has keys or queries that are not finite: nothing to measure")
    return found


def of_view(view: LayerView) -> Moments:
    """What one text shows of a layer; the queries of a group count together."""
    keys, queries = (x[0].double().cpu() for x in (view.keys, view.queries.states))
    queries = queries.reshape(len(keys), -1, keys.shape[-1])
    return Moments(*(x.mT @ x / x.shape[1] for x in (keys, queries)))
