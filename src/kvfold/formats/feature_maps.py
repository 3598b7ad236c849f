"""Feature maps: vectors of queries and keys whose product stands for exp(q k / sqrt(D)) (LESS, arXiv:2402.09398)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.options import shown

AXES = {"q1": 4, "q2": 4, "k1": 4, "k2": 4, "k3": 4, "s1": 3, "s2": 3}
"""The tensors of all layers' maps, with their axes: a layer, then those of `FeatureMaps`."""
_brought: dict[str, Mapping[str, Tensor]] = {}
"""All that this process has read of calibrations, which keeps what it has read of them, too."""


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """phi and psi of one layer: M hidden numbers, R features, each head its own."""

    q1: Float[Tensor, "Hq D M"]
    q2: Float[Tensor, "Hq M R"]
    k1: Float[Tensor, "H D M"]
    k2: Float[Tensor, "H M R"]
    k3: Float[Tensor, "H R R"]
    s1: Float[Tensor, "H R"]
    s2: Float[Tensor, "H R"]

    def phi(self, q: Float[Tensor, "B Hq Q D"]) -> Float[Tensor, "B Hq Q R"]:
        """|gelu(gelu(q W1) W2)|, of queries as the model rotated them, not scaled."""
        return F.gelu(F.gelu(q.float() @ self.q1) @ self.q2).abs()

    def psi(self, k: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T R"]:
        """|u + (u U3) s2| of u = |s1| gelu(gelu(k U1) U2), of keys as the model rotated them."""
        u = self.s1.abs()[:, None] * F.gelu(F.gelu(k.float() @ self.k1) @ self.k2)
        return (u + (u @ self.k3) * self.s2[:, None]).abs()


def check_maps(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless `data` are the maps of some layers, all of one shape, and finite."""
    for name, axes in AXES.items():
        part = data.get(name)
        if not isinstance(part, Tensor) or part.dim() != axes or not part.is_floating_point():
            raise ValueError(f"the calibration of less lacks {name!r}, a tensor of {axes} axes")
    shapes = {name: tuple(data[name].shape) for name in AXES}
    layers, queries, size, hidden = shapes["q1"]
    heads, rank = shapes["k1"][1], shapes["q2"][-1]
    wanted = {
        "q1": (layers, queries, size, hidden), "q2": (layers, queries, hidden, rank),
        "k1": (layers, heads, size, hidden), "k2": (layers, heads, hidden, rank), "k3": (layers, heads, rank, rank),
        "s1": (layers, heads, rank), "s2": (layers, heads, rank),
    }  # fmt: skip
    if shapes != wanted or not all(layers and heads and rank for layers, heads, *_, rank in shapes.values()):
        raise ValueError(f"the calibration of less has parts that do not fit together: {shapes}")
    if queries % heads or not all(bool(data[name].isfinite().all()) for name in AXES):
        raise ValueError("the calibration of less must be finite, with as many query heads for each KV head")


def bring(data: Mapping[str, Tensor]) -> str:
    """Make maps known to formats, which name them by what this returns: a digest, 16 hex digits.

    Raises ValueError for what is none.
    """
    check_maps(data)
    digest = hashlib.sha256()
    for name in AXES:
        part = data[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        digest.update(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    name = digest.hexdigest()[:16]
    _brought.setdefault(name, {part: data[part].detach() for part in AXES})
    return name


@lru_cache(maxsize=1024)
def maps_of(name: str, layer: int, device: torch.device) -> FeatureMaps:
    """Layer `layer`'s, in float32. Raises ValueError where nobody has brought them, or not of so many layers."""
    data = _brought.get(name)
    if data is None:
        raise ValueError(f"maps={shown(name)} are not those of a calibration that was loaded: theirs was another one")
    if layer >= len(data["q1"]):
        raise ValueError(f"layer={layer} must be one of the {len(data['q1'])} that maps={name!r} are of")
    return FeatureMaps(*(data[part.name][layer].to(device, torch.float32) for part in fields(FeatureMaps)))
