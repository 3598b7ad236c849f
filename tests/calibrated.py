"""Artefacts for the tiny models, in a folder that is gone when the tests end: made-up roles, fixed by seed."""

import atexit
import os
import random
import tempfile

import torch
from torch import Tensor

from kvfold import artefacts

_folder = tempfile.TemporaryDirectory(prefix="kvfold-artefacts-")
atexit.register(_folder.cleanup)
os.environ["KVFOLD_ARTEFACTS"] = _folder.name

SMALL = {
    "duoattention": {"sinks": 2, "recent": 6}, "razorattention": {"local": 6, "share": 0.1, "sinks": 2},
    "delta": {"budget": 12, "page": 4, "recent": 4},
    "lserve": {"budget": 16, "page": 8, "logical": 4, "static_sparsity": 0.5, "sinks": 4, "recent": 8},
    "mustafar": {"residual": 8, "group": 8}, "think": {"recent": 4, "window": 8}, "zipcache": {"group": 8, "gap": 4},
    "shadowkv": {"rank": 6, "chunk": 4, "local": 1, "outliers": 1},
}  # fmt: skip
"""Options under which methods without a budget do something to tests' short prompts."""


def table(layers: int, heads: int, seed: int = 0) -> list[list[float]]:
    rng = random.Random(f"{seed}:{layers}:{heads}")
    return [[round(rng.random(), 4) for _ in range(heads)] for _ in range(layers)]


def gates(layers: int, width: int, heads: int, seed: int = 0) -> dict[str, Tensor]:
    """An attention gate in front of each layer: the first looks at the token itself, the others at none.

    So a narrow dtype, in which all later states differ by a per cent, moves no token over the threshold.
    """
    rng = torch.Generator().manual_seed(seed)
    look, value = torch.randn(2, layers, 1, 16, width, generator=rng) / width**0.5
    flags = torch.randn(layers, heads, 1, 16, generator=rng)
    flags[1:] = 0.0
    sign = (-1.0) ** torch.arange(layers * heads).view(layers, heads)
    bias = torch.where(torch.arange(layers)[:, None] > 0, 9.0 * sign, 0.5)
    return {"wq": 3.0 * look, "wk": 3.0 * look, "wv": value, "wg": flags, "bg": bias}


def levels(layers: int, heads: int, size: int) -> dict[str, Tensor]:
    """KVQuant's tables: even levels, in the range that the tiny models' keys have."""
    high = torch.full((layers, heads, size), 6.0)
    made = {"low": -high, "high": high}
    for bits in (2, 3, 4):
        made[f"keys.{bits}"] = torch.tensor([*torch.linspace(-1, 1, 1 << bits).tolist(), 1.0, 0.0]).expand(layers, -1)
        made[f"values.{bits}"] = made[f"keys.{bits}"]
    return {name: table.clone(memory_format=torch.contiguous_format) for name, table in made.items()}


def feature_maps(
    layers: int, queries: int, heads: int, size: int, seed: int = 0, weight: float = 0.02
) -> dict[str, Tensor]:
    """Four features of eight hidden numbers for each head; `weight`: how much a state weighs."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"q1": (queries, size, 8), "q2": (queries, 8, 4), "k1": (heads, size, 8), "k2": (heads, 8, 4)}
    shapes["k3"] = (heads, 4, 4)
    data = {n: torch.randn(layers, *shape, generator=rng) / shape[1] ** 0.5 for n, shape in shapes.items()}
    return data | {name: torch.full((layers, heads, 4), weight) for name in ("s1", "s2")}


def elite(layers: int, heads: int, size: int, turned: int, seed: int = 0) -> dict[str, Tensor]:
    """Two rotated pairs of each head, of `turned` channels that rotate, and a basis of two thirds of all else."""
    rng = torch.Generator().manual_seed(seed)
    flags, wide = torch.zeros(layers, heads, size, dtype=torch.bool), heads * (2 * size - 4)
    for first in torch.stack([torch.randperm(turned // 2, generator=rng)[:2] for _ in range(layers * heads)]).T:
        flags.view(-1, size)[torch.arange(layers * heads), first] = True
        flags.view(-1, size)[torch.arange(layers * heads), first + turned // 2] = True
    whole = torch.linalg.qr(torch.randn(layers, wide, wide, generator=rng, dtype=torch.float64))[0]
    return {"elite": flags, "basis": whole[..., : wide * 2 // 3].float().contiguous()}


def bases(layers: int, heads: int, size: int, seed: int = 0) -> dict[str, Tensor]:
    """Directions of each head, and weights of 1/2 to 2."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(layers, heads, size, size, generator=rng, dtype=torch.float64))[0]
    weight = torch.logspace(-1, 1, size, base=2.0).expand(layers, heads, -1)
    return {"turn": turn.float().contiguous(), "weight": weight.contiguous(), "channels": weight.flip(-1).contiguous()}


def codebooks(layers: int, heads: int, size: int, seed: int = 0) -> dict[str, Tensor]:
    """Thirty-two vectors of each head, at the distance of the paper."""
    rng = torch.Generator().manual_seed(seed)
    turn = torch.randn(layers, heads, size, size, generator=rng).tril(-1) / size + torch.eye(size)
    centres = 2 * torch.randn(layers, heads, 32, size, generator=rng)
    return {"turn": turn, "centres": centres, "distance": torch.full((layers,), 2048)}


def calibrate(model, name: str) -> None:
    """Give every calibrated method an artefact for `model`, in the user's folder."""
    config = artefacts.text_config(model)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum(kind == "full_attention" for kind in kinds)
    kv, queries = getattr(config, "num_key_value_heads", config.num_attention_heads), config.num_attention_heads
    about = {
        "fingerprint": artefacts.fingerprint(model), "name": name, "layers": layers, "kv_heads": kv,
        "query_heads": queries,
    }  # fmt: skip
    data = {
        "duoattention": {"gates": table(layers, kv)},
        "razorattention": {"induction": table(layers, kv, 1), "echo": table(layers, kv, 2)},
        "headkv": {"reason": table(layers, queries, 3), "copy": table(layers, queries, 4)},
        "compresskv": {"heads": table(layers, queries, 5), "errors": table(1, layers, 6)[0] if layers else []},
    }
    if layers:
        data["attention-gate"] = gates(layers, config.hidden_size, kv)
        size = getattr(config, "head_dim", None) or config.hidden_size // queries
        data["kvquant"] = levels(layers, kv, size)
        data["a2ats"] = codebooks(layers, kv, size)
        data["turboquant"] = bases(layers, kv, size)
        data["less"] = feature_maps(layers, queries, kv, size)
        part = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        data["elitekv"] = elite(layers, kv, size, int(size * part))
    for slug, found in data.items():
        artefacts.save(artefacts.Artefact(slug, about, found, {"command": "made up"}))
