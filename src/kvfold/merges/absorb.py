"""Tokens fold into others: sums over each set, weighted means, and what is written where.

A set is named by its home, the slot of the token that takes the others in; `home` (B, H, T) gives each slot's, its own
where it goes nowhere. Sums are float32.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.decisions import Amend
from kvfold.formats import LOG_MASS
from kvfold.rotation import Rope
from kvfold.views import LayerView


def at_home(like: Tensor) -> Int[Tensor, "B H T"]:
    """Every slot its own home."""
    return torch.arange(like.shape[2], device=like.device).expand(like.shape[:3]).contiguous()


def over_set(x: Float[Tensor, "B H T"], home: Int[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
    """The sum of `x` over each slot's set, at every member."""
    return torch.zeros_like(x).scatter_add_(-1, home, x).gather(-1, home)


def log_over_set(x: Float[Tensor, "B H T"], home: Int[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
    """The log of the sum of exp(x) over each slot's set, at every member; no sum overflows."""
    most = torch.full_like(x, -torch.inf).scatter_reduce_(-1, home, x, "amax").gather(-1, home)
    most = most.masked_fill(most.isinf(), 0.0)
    return over_set((x - most).exp(), home).log() + most


def take(states: Float[Tensor, "B H T D"], slots: Int[Tensor, "B H N"]) -> Float[Tensor, "B H N D"]:
    """The states in these slots."""
    return states.gather(2, slots[..., None].expand(*slots.shape, states.shape[-1]))


def mixed(
    states: Float[Tensor, "B H T D"], home: Int[Tensor, "B H T"], weight: Float[Tensor, "B H T"]
) -> Float[Tensor, "B H T D"]:
    """At each home the sum of weight * state over its set; a token that nothing joins comes back bit for bit."""
    joined = over_set(torch.ones_like(weight), home) > 1
    total = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    total.scatter_add_(2, home[..., None].expand_as(states), states.float() * weight[..., None])
    return torch.where((joined & (home == at_home(weight)))[..., None], total.to(states.dtype), states)


def few(touched: Bool[Tensor, "B H T"]) -> tuple[Int[Tensor, "B H N"], Bool[Tensor, "B H N"]]:
    """The marked slots of each (row, head) in order, then others up to the most that one has; and which are marked."""
    most = int(touched.sum(-1).max()) if touched.numel() else 0
    if most * 8 > touched.shape[-1]:
        slots = torch.argsort((~touched).byte(), dim=-1, stable=True)[..., :most]
    else:  # as at a decode step
        slots = torch.topk(touched.byte(), most, dim=-1).indices.sort(-1).values
        slots = slots.gather(-1, torch.argsort((~touched.gather(-1, slots)).byte(), dim=-1, stable=True))
    return slots, touched.gather(-1, slots)


def absorb(
    view: LayerView,
    home: Int[Tensor, "B H T"],
    weight: Float[Tensor, "B H T"],
    value_weight: Float[Tensor, "B H T"] | None = None,
    rope: Rope | None = None,
) -> Amend:
    """What takes others in becomes the sum of weight * token over its set; a dropped token's home is itself.

    Works on the tokens that are touched, so that a decode step costs as much as what it merges. `value_weight`: other
    weights for the values. `rope`: keys are added up as they were before RoPE, and turned to the home's position.
    """
    moved = view.valid & (home != at_home(home))
    touched = torch.zeros_like(moved, dtype=torch.int8).scatter_reduce_(-1, home, moved.to(torch.int8), "amax").bool()
    slots, here = few(touched | moved)
    rank = (touched | moved).cumsum(-1) - 1
    near = torch.where(here, rank.gather(-1, home.gather(-1, slots)), at_home(slots))
    keys, values, positions = take(view.keys, slots), take(view.values, slots), view.positions.gather(-1, slots)
    still = keys if rope is None else rope.shift(keys.float(), -positions)
    keys = mixed(still, near, weight.gather(-1, slots))
    keys = keys if rope is None else rope.shift(keys, positions)
    values = mixed(values, near, (weight if value_weight is None else value_weight).gather(-1, slots))
    return Amend(torch.where(here & touched.gather(-1, slots), slots, -1), keys, values)


def log_mass(view: LayerView) -> Float[Tensor, "B H T"]:
    """The log of how many tokens each slot stands for."""
    return view.columns.get(LOG_MASS, torch.zeros(view.valid.shape, device=view.valid.device))


def counted(view: LayerView, home: Int[Tensor, "B H T"]) -> dict[str, Tensor]:
    """The column with the log of how many tokens each set stands for: what makes merging equal tokens exact."""
    mass = log_mass(view).masked_fill(~view.valid, -torch.inf)
    takes = (home == at_home(home)) & (over_set(view.valid.float(), home) > 1)
    return {LOG_MASS: torch.where(takes, log_over_set(mass, home), log_mass(view))}


FRAMES = ("rotated", "unrotated")
"""In which keys are compared and added up: as the cache holds them, or as they were before RoPE."""


def rope_for(view: LayerView, frame: str) -> Rope | None:
    """The layer's RoPE where `frame` needs it. Raises ValueError where the model has none that turns on."""
    if frame == "rotated":
        return None
    if view.place.rope is None:
        raise ValueError(
            f"frame={frame!r} needs the model's RoPE, and layer {view.place.layer} has none that it could use; "
            "use 'rotated'"
        )
    return view.place.rope
