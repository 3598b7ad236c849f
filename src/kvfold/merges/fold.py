"""Folding sets of tokens into their pivots with Gaussian kernel weights (KVMerger, arXiv:2407.08454)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.merges.absorb import mixed, over_set, take


@dataclass(frozen=True)
class Folded:
    """Each set as one token, at its pivot's slot."""

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T Dv"]
    pivot: Bool[Tensor, "B H T"]
    """Slots that stand for a set (a token alone is its own)."""
    size: Float[Tensor, "B H T"]
    """Summed mass of the set that a slot belongs to."""
    weight: Float[Tensor, "B H T"]
    """What each member contributes; sums to 1 over a set."""


def pivots(sets: Int[Tensor, "B H T"], importance: Float[Tensor, "B H T"]) -> Bool[Tensor, "B H T"]:
    """The most important member of each set; ties go to the earlier token, what is not a number counts as the least."""
    importance = importance.nan_to_num(torch.finfo(importance.dtype).min)
    best = torch.full_like(importance, -torch.inf).scatter_reduce(-1, sets, importance, "amax")
    top = importance == best.gather(-1, sets)
    slot = torch.arange(sets.shape[-1], device=sets.device).expand_as(sets)
    first = torch.full_like(sets, sets.shape[-1]).scatter_reduce(-1, sets, slot.where(top, sets.shape[-1]), "amin")
    return slot == first.gather(-1, sets)


def fold_sets(
    keys: Float[Tensor, "B H T D"],
    values: Float[Tensor, "B H T Dv"],
    sets: Int[Tensor, "B H T"],
    importance: Float[Tensor, "B H T"],
    mass: Float[Tensor, "B H T"],
    *,
    bandwidth: str | float = "mean_distance",
    by_mass: bool = False,
) -> Folded:
    """Merge every set: weights g_i = exp(-|k_p - k_i|^2 / 2 sigma^2) times the mass of the member, scaled to sum 1.

    `bandwidth` is sigma: a number, `mean_distance` (mean_i |k_p - k_i| / sqrt 2, for each set), or `literal` (the
    fixed point of the printed formula, mean_i g_i / sqrt 2). Members that stand for several tokens (`mass` over 1)
    weigh as many; `by_mass`: values by that alone. Sums are float32; tokens alone come back bit for bit.
    """
    pivot = pivots(sets, importance)
    slots = torch.arange(sets.shape[-1], device=sets.device).expand_as(sets)
    home = torch.zeros_like(sets).scatter_reduce(-1, sets, slots.where(pivot, 0), "amax").gather(-1, sets)
    distance = (keys.float() - take(keys, home).float()).norm(dim=-1)
    weight = _gaussian(distance, sets, bandwidth).masked_fill(pivot, 1.0) * mass
    weight = weight / over_set(weight, sets)
    size = over_set(mass, sets)
    return Folded(
        mixed(keys, home, weight), mixed(values, home, mass / size if by_mass else weight), pivot, size, weight
    )


def _gaussian(distance: Tensor, sets: Tensor, bandwidth: str | float) -> Tensor:
    size = over_set(torch.ones_like(distance), sets)
    if bandwidth == "literal":
        kernel = torch.ones_like(distance)
        for _ in range(32):
            sigma = (over_set(kernel, sets) / (2**0.5 * size)).clamp(min=1e-6)
            kernel = torch.exp(-(distance**2) / (2 * sigma**2))
        return kernel
    if bandwidth == "mean_distance":
        sigma = (over_set(distance, sets) / (2**0.5 * size)).clamp(min=1e-6)
    else:
        sigma = torch.full_like(distance, float(bandwidth))
    return torch.exp(-(distance**2) / (2 * sigma**2))
