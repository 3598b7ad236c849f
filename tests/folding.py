"""States of LESS for tests: random maps, what is folded into them, and what a query reads by the paper's formula."""

import math

import torch
from torch import Tensor

from calibrated import feature_maps
from kvfold.formats import POSITION, Chunk, Spec, Summed, SummedSegment
from kvfold.formats.feature_maps import FeatureMaps, bring

B, H, G, D, DV = 2, 2, 2, 16, 16


def maps_by_name(weight: float = 0.3, seed: int = 0, layers: int = 1, **changed: Tensor) -> str:
    return bring({**feature_maps(layers, H * G, H, D, seed, weight), **changed})


def segment_of(name: str, rows: int = B) -> SummedSegment:
    return Summed(name, 0).open(Spec(rows, H, D, DV, torch.float32, torch.device("cpu")))


def random_chunk(count: int, seed: int = 0, start: int = 0, share: float = 1.0) -> Chunk:
    rng = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(B, H, count, d, generator=rng) for d in (D, DV))
    valid = torch.rand(B, H, count, generator=rng) <= share
    places = torch.arange(start, start + count, dtype=torch.int32).expand(B, H, count)
    return Chunk(keys, values, valid, {POSITION: places.contiguous()})


def gelu(x: float) -> float:
    return x * 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def times(x: list[float], weights: Tensor) -> list[float]:
    """A vector times a matrix."""
    return [sum(a * b for a, b in zip(x, column, strict=True)) for column in weights.T.tolist()]


def slow_phi(maps: FeatureMaps, head: int, q: Tensor) -> list[float]:
    """|gelu(gelu(q W1) W2)| of one query."""
    hidden = [gelu(x) for x in times(q.tolist(), maps.q1[head])]
    return [abs(gelu(x)) for x in times(hidden, maps.q2[head])]


def slow_psi(maps: FeatureMaps, head: int, k: Tensor) -> list[float]:
    """|u + (u U3) s2| of u = |s1| gelu(gelu(k U1) U2), of one key."""
    hidden = [gelu(x) for x in times(k.tolist(), maps.k1[head])]
    features = [gelu(x) for x in times(hidden, maps.k2[head])]
    u = [abs(s) * x for s, x in zip(maps.s1[head].tolist(), features, strict=True)]
    return [abs(x + y * s) for x, y, s in zip(u, times(u, maps.k3[head]), maps.s2[head].tolist(), strict=True)]


def slow_read(
    maps: FeatureMaps, head: int, q: Tensor, k: Tensor, v: Tensor, gone: list[int], kept: list[int]
) -> Tensor:
    """What a query of KV head `head // G` reads: phi psi of those that are gone, exp of the others."""
    kv, phi = head // G, slow_phi(maps, head, q)
    total, out = 0.0, torch.zeros(v.shape[-1], dtype=torch.float64)
    for t in gone + kept:
        if t in gone:
            weight = sum(a * b for a, b in zip(phi, slow_psi(maps, kv, k[kv, t]), strict=True))
        else:
            weight = math.exp(float(q @ k[kv, t]) / math.sqrt(D))
        total += weight
        out += weight * v[kv, t].double()
    return (out / total).float()
