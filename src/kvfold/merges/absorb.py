"""Tokens fold into others: sums over each set, weighted means, and what is written where.

A set is named by its home, the slot of the token that takes the others in; `home` (B, H, T) gives each slot's, its own
where it goes nowhere. Sums are float32.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import LOG_MASS
from kvfold.rotation import Rope
from kvfold.views import LayerView
from kvfold.views.decisions import Amend


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
    rows, heads = (torch.arange(n, device=slots.device) for n in slots.shape[:2])
    return states[rows[:, None, None], heads[:, None], slots]  # faster than `gather` with an index for each number


def into_rows(
    total: Float[Tensor, "B H N D"], rows: Int[Tensor, "B H M"], states: Float[Tensor, "B H M D"]
) -> Float[Tensor, "B H N D"]:
    """Add each of the states to the row of `total`, contiguous, that `rows` names; gives `total`."""
    (b, h, n, d), device = total.shape, total.device
    flat = rows + torch.arange(b * h, device=device).view(b, h, 1) * n  # torch is faster along the first axis
    total.view(-1, d).scatter_add_(0, flat.view(-1, 1).expand(-1, d), states.reshape(-1, d))
    return total


def mixed(
    states: Float[Tensor, "B H T D"], home: Int[Tensor, "B H T"], weight: Float[Tensor, "B H T"]
) -> Float[Tensor, "B H T D"]:
    """At each home the sum of weight * state over its set; a token that nothing joins comes back bit for bit."""
    joined = over_set(torch.ones_like(weight), home) > 1
    total = into_rows(
        torch.zeros(states.shape, device=states.device, dtype=torch.float32), home, states.float() * weight[..., None]
    )
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
    weight: Float[Tensor, "B H T"] | None,
    value_weight: Float[Tensor, "B H T"] | None = None,
    rope: Rope | None = None,
) -> Amend:
    """What takes others in becomes the sum of weight * token over its set; a dropped token's home is itself.

    Works on the tokens that are touched, so that a decode step costs as much as what it merges. `value_weight`: other
    weights for the values; no `weight`: keys stay. `rope`: keys are added up as they were before RoPE, and turned to
    the home's position.
    """
    moved = view.valid & (home != at_home(home))
    takes = torch.zeros_like(moved, dtype=torch.int8).scatter_reduce_(-1, home, moved.to(torch.int8), "amax").bool()
    (slots, here), (gone, goes) = few(takes), few(moved)
    into = (takes.cumsum(-1) - 1).gather(-1, home.gather(-1, gone))
    into = into.masked_fill(~goes, slots.shape[-1])  # one behind the last: those that fill up add to nothing
    at, left = view.positions.gather(-1, slots), view.positions.gather(-1, gone)

    def summed(states: Tensor, weight: Tensor, rope: Rope | None) -> Tensor:
        own, others = take(states, slots).float(), take(states, gone).float()
        if rope is not None:
            own, others = rope.shift(own, -at), rope.shift(others, -left)
        total = torch.cat(
            [own * weight.gather(-1, slots)[..., None], own.new_zeros(*own.shape[:2], 1, own.shape[3])], 2
        )
        into_rows(total, into, others * weight.gather(-1, gone)[..., None])
        total = total[:, :, :-1]
        return (total if rope is None else rope.shift(total, at)).to(states.dtype)

    keys = None if weight is None else summed(view.keys, weight, rope)
    by = weight if value_weight is None else value_weight
    return Amend(torch.where(here, slots, -1), keys, None if by is None else summed(view.values, by, None))


def log_mass(view: LayerView) -> Float[Tensor, "B H T"]:
    """The log of how many tokens each slot stands for."""
    return view.columns.get(LOG_MASS, torch.zeros(view.valid.shape, device=view.valid.device, dtype=torch.float32))


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
