"""A2ATS's calibration: a codebook of each head's keys before RoPE, by what far queries make of them."""

import random
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.calibration.run import Run
from kvfold.calibration.sensitivity import sample
from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.selectors.clusters import kmeans, nearest, spread
from kvfold.selectors.vectors import MOST
from kvfold.views import LayerView

DISTANCE = 2048
"""Behind all keys, where queries are asked (b); the paper's."""
CODES = 1024
"""Vectors of a head, unless told; the paper has 4,096."""
EACH = 4
"""Keys that a vector must have on average, where nobody says how many there are."""
RANDOM = 4
"""To so many running texts comes one of random identifiers, as in the paper."""
ITERATIONS = 50
RIDGE = 1e-6
"""Added to the diagonal of H, whose entries have a root mean square of 1."""


@dataclass
class HeadsSeen:
    """A layer's keys before RoPE, and the second moment of its queries `DISTANCE` behind them, float64."""

    keys: list[Float[Tensor, "H T D"]] = field(default_factory=list)
    moment: Float[Tensor, "H D D"] | float = 0.0


def a2ats_codebooks(run: Run) -> dict[str, Any]:
    """`turn` (L, H, D, D), float32: L of each paged layer and KV head, L L' = H; `centres` (L, H, K, D), float16;
    `distance` (L,), int64.

    H is of the queries of all heads of a group. Centres are k-means of z = k L (k-means++, one start). What is said of
    a text that nobody fitted to (`error`) is |z - c|^2 over |z - mean|^2, layer by layer: 0 is exact, 1 as much as one
    vector for all keys would do.
    """
    samples, length = run.sizes(8, 2048)
    layers, held = look(run, samples, length)
    points = sum(each.shape[1] for each in layers[0].keys)
    codes = min(CODES, max(1, points // EACH)) if run.codes is None else run.codes
    if codes > min(points, MOST):
        raise ValueError(f"codes={codes} must be at most {min(points, MOST)}: there are {points} keys, or 16 bits")
    turns, centres, errors = [], [], []
    for layer, (seen, other) in enumerate(zip(layers, held, strict=True)):
        run.tick(f"layer {layer + 1} of {len(layers)}")
        turn = factor(seen.moment)
        z = torch.cat(seen.keys, 1) @ turn
        made = torch.cat([cluster(each[None], codes, run.seed, layer, head) for head, each in enumerate(z)])
        turns.append(turn)
        centres.append(made.half())
        errors.append(lost(torch.cat(other.keys, 1) @ turn, centres[-1].float()))
    run.about.update(codes=codes, distance=DISTANCE, error=[float(f"{x:.4g}") for x in errors])
    distance = torch.full((len(turns),), DISTANCE, dtype=torch.int64)
    return {"turn": torch.stack(turns), "centres": torch.stack(centres), "distance": distance}


def factor(moment: Float[Tensor, "H D D"] | float) -> Float[Tensor, "H D D"]:
    """L, float32, lower triangular, L L' = H + `RIDGE`, of a second moment that is scaled to entries of size 1."""
    assert isinstance(moment, Tensor)  # some text was read
    size = moment.square().mean((1, 2), keepdim=True).sqrt()
    unit = torch.eye(moment.shape[-1], dtype=torch.float64)
    scaled = torch.where(size > 0, moment / size, unit)
    found: Tensor = torch.linalg.cholesky(scaled + RIDGE * unit).float()
    return found


def cluster(z: Float[Tensor, "1 N D"], codes: int, *key: int) -> Float[Tensor, "1 K D"]:
    """Centres of z, from a start that the key names."""
    return kmeans(z, spread(z[0], codes, *key)[None], ITERATIONS)


def lost(z: Float[Tensor, "H N D"], centres: Float[Tensor, "H K D"]) -> float:
    """How far z is from its centres, of how far from its mean, squares; over all heads."""
    _, apart = nearest(z, centres)
    about = (z - z.mean(1, keepdim=True)).square().sum(-1)
    return float(apart.sum() / about.sum().clamp(min=1e-30))


@torch.no_grad()
def look(run: Run, samples: int, length: int) -> tuple[list[HeadsSeen], list[HeadsSeen]]:
    """What `samples` running texts and some random ones show, and what one more running text does that nobody fits to.

    Raises ValueError where a layer's rotation is not known, and for numbers that are not finite.
    """
    rng = random.Random(run.seed)
    noise = -(-samples // RANDOM)
    texts = [sample(run, rng, length) for _ in range(samples)] + [identifiers(run, rng, length) for _ in range(noise)]
    fitted: list[HeadsSeen] = []
    held: list[HeadsSeen] = []
    for number, ids in enumerate([*texts, sample(run, rng, length)]):
        run.tick(f"text {number + 1} of {len(texts) + 1}")
        found, cache = fitted if number < len(texts) else held, Cache(run.model, "full")

        def observe(view: LayerView, found: list[HeadsSeen] = found) -> None:
            if view.place.ordinal == len(found):
                found.append(HeadsSeen())
            add(found[view.place.ordinal], view)

        with cache.observed(observe):
            run.model(ids.to(run.model.device), logits_to_keep=1, **with_cache(run.model, cache))
    for layer, each in enumerate(fitted):
        assert isinstance(each.moment, Tensor)
        if not bool(each.moment.isfinite().all() and torch.cat(each.keys, 1).isfinite().all()):
            raise ValueError(f"layer {layer} on pages has keys or queries that are not finite: nothing to measure")
    return fitted, held


def add(seen: HeadsSeen, view: LayerView) -> None:
    """What one text shows of a layer; the queries of a group count together."""
    rope, heads = view.place.rope, view.heads
    if rope is None:
        raise ValueError(f"a2ats needs to know what rotates the keys of layer {view.place.layer}, which is not known")
    keys, queries, places = view.keys.float(), view.queries.states.float(), view.positions[:, :1]
    seen.keys.append(rope.shift(keys, -places.expand(-1, heads, -1))[0].cpu())
    asked = rope.shift(queries, (DISTANCE - places).expand(-1, queries.shape[1], -1))[0].double().cpu()
    asked = asked.reshape(heads, -1, asked.shape[-1])
    seen.moment = seen.moment + asked.mT @ asked


def identifiers(run: Run, rng: random.Random, length: int) -> Int[Tensor, "1 T"]:
    """Random UUIDs, `length` tokens of them."""
    words = list[int]()
    while len(words) < length:
        text = " ".join(str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(64))
        words += run.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([[*run.first, *words][:length]], dtype=torch.int64)
