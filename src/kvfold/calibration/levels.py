"""KVQuant's calibration: ranges of key channels, and levels by k-means that weighs by gradients (arXiv:2401.18079)."""

import random
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvfold.calibration.duo import mixing
from kvfold.calibration.run import Run
from kvfold.calibration.sensitivity import sample
from kvfold.formats.levels import BITS, ends, in_range, nearest, outstanding
from kvfold.hf.cache import Cache
from kvfold.hf.rope import find_ropes

OUTSIDE, SINKS, EXACT = 0.01, 1, 1
"""Share of a key channel's numbers that are outside its range; first tokens that are not looked at, and numbers of a
value that are not: what the method holds as they are."""
BINS, ROUNDS = 4096, 200
"""Of a range, in which numbers are counted together; of k-means, at most."""


class Seen:
    """The attention of a pass; the keys and values of each paged layer, with their gradients once there are any."""

    def __init__(self, paged: list[int]):
        self.paged = frozenset(paged)
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in self.paged:
            for states in (key, value):  # weights take no gradient, so that the first layer's do not either
                if not states.requires_grad:
                    states.requires_grad_()
            self.states[layer] = key, value
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return out, None


def kvquant_levels(run: Run) -> dict[str, Any]:
    """Of each paged layer `low` and `high` (L, H, D), and for 2, 3 and 4 bits `keys.{bits}` and `values.{bits}`
    (L, 2^bits + 2): levels, and the gain and the shift that bring what they stand for to the mean and spread of what
    they are for (Q-Norm).

    Less text than the paper's 16 samples of 2048 tokens, to run without a GPU; more `samples` and `length` go there.
    """
    samples, length = run.sizes(16, 512)
    run.about.update(outside=OUTSIDE, sinks=SINKS, exact=EXACT)
    rng, model, ropes = random.Random(run.seed), run.model, find_ropes(run.model)
    paged = [core.layer for core in Cache(model, "full").paged]
    found: dict[int, list[list[Tensor]]] = {layer: [] for layer in paged}
    seen = Seen(paged)
    with mixing(model, seen), torch.enable_grad():
        for number in range(samples):
            run.tick(f"sample {number + 1} of {samples}")
            ids = sample(run, rng, length).to(model.device)
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            each = [states for layer in paged for states in seen.states[layer]]
            slopes = torch.autograd.grad(F.cross_entropy(logits, ids[0, 1:].to(logits.device)), each)
            for i, layer in enumerate(paged):
                keys, values = (still(each[2 * i + j], ropes.get(layer) if j == 0 else None) for j in (0, 1))
                tilts = [still(slopes[2 * i + j], ropes.get(layer) if j == 0 else None) for j in (0, 1)]
                found[layer].append([keys, tilts[0].square(), values, tilts[1].square()])
            seen.states = {}
    made: dict[str, list[Tensor]] = {}
    for layer in paged:
        run.tick(f"levels of layer {layer}")
        parts = (torch.cat(part, 1) for part in zip(*found.pop(layer), strict=True))  # H N D
        for name, table in layer_levels(*parts).items():
            made.setdefault(name, []).append(table)
    return {name: torch.stack(tables) for name, tables in made.items()}


def still(states: Float[Tensor, "1 H T D"], rope: Any) -> Float[Tensor, "H N D"]:
    """Keys, or their gradients, turned back to position 0 by a layer's rotation (None: as they are); without sinks."""
    wide = states.detach().float()
    if rope is not None:
        at = torch.arange(wide.shape[2], device=wide.device, dtype=torch.int64)
        wide = rope.shift(wide, -at.expand(wide.shape[:3]))
    return wide[0, :, SINKS:].cpu()


def layer_levels(
    keys: Float[Tensor, "H N D"], key_weights: Float[Tensor, "H N D"],
    values: Float[Tensor, "H N D"], value_weights: Float[Tensor, "H N D"],
) -> dict[str, Tensor]:  # fmt: skip
    """What one layer's tables hold, float32."""
    low, high = (torch.stack([quantile(head, share) for head in keys]) for share in (OUTSIDE / 2, 1 - OUTSIDE / 2))
    shares = in_range(keys, (low / 2 + high / 2)[:, None], (high / 2 - low / 2)[:, None])
    inside = (keys >= low[:, None]) & (keys <= high[:, None])
    apart = outstanding(values, min(EXACT, values.shape[-1]))
    of_values = in_range(values, *ends(values, apart))
    made = {"low": low, "high": high}
    for bits in BITS:
        made[f"keys.{bits}"] = fitted(shares[inside], key_weights[inside], bits)
        made[f"values.{bits}"] = fitted(of_values[~apart], value_weights[~apart], bits)
    return {name: table.contiguous() for name, table in made.items()}


def quantile(x: Float[Tensor, "N D"], share: float) -> Float[Tensor, " D"]:
    """Of each channel, linear between its numbers. (torch's own takes no more than 16 million numbers.)"""
    rank = share * (len(x) - 1)
    ordered, first = x.sort(0).values, int(rank)
    return ordered[first].lerp(ordered[min(first + 1, len(x) - 1)], rank - first)


def fitted(x: Float[Tensor, " N"], weights: Float[Tensor, " N"], bits: int) -> Float[Tensor, " K"]:
    """2^bits levels for numbers from -1 to 1, then the gain and the shift of Q-Norm."""
    levels = weighted_means(x, weights, bits)
    codes = nearest(x.view(1, 1, 1, -1), levels.view(1, 1, -1)).flatten()
    coded = levels[codes].double()
    spread = float(coded.std(correction=0)) if len(x) else 0.0
    gain = float(x.double().std(correction=0)) / spread if spread > 0 else 1.0
    shift = float(x.double().mean()) - float(coded.mean()) * gain if len(x) else 0.0
    return torch.cat([levels, torch.tensor([gain, shift], dtype=torch.float32)])


def weighted_means(x: Float[Tensor, " N"], weights: Float[Tensor, " N"], bits: int) -> Float[Tensor, " K"]:
    """Weighted k-means of numbers from -1 to 1 in ascending order, counted in bins of 1/2048 (Lloyd's iteration).

    It begins where levels of the least error lie if there are many: as dense as the third root of the weight. Where
    nothing weighs anything, all numbers weigh the same.
    """
    count = 1 << bits
    even = not bool((weights > 0).any())
    heavy, wide = (torch.ones_like(weights) if even else weights).double(), x.double()
    place = ((wide + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    mass = torch.bincount(place, heavy, minlength=BINS)
    moment = torch.bincount(place, heavy * wide, minlength=BINS)
    middles = (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS * 2 - 1
    at = torch.where(mass > 0, moment / mass.masked_fill(mass == 0, 1.0), middles)
    dense = mass.pow(1 / 3).cumsum(0)
    asked = (torch.arange(count, dtype=torch.float64) + 0.5) / count * dense[-1]
    levels = at[torch.searchsorted(dense, asked).clamp(max=BINS - 1)]
    for _ in range(ROUNDS):
        mine = torch.searchsorted((levels[1:] + levels[:-1]) / 2, at)
        total = torch.bincount(mine, mass, minlength=count)
        moved = torch.where(total > 0, torch.bincount(mine, moment, minlength=count) / total.clamp(min=1e-300), levels)
        if bool((moved - levels).abs().max() < 1e-9):
            break
        levels = moved
    return levels.float()
