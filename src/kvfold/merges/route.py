"""Where a dropped token goes: to the most similar one that stays, the nearest in the text, or a match in its chunk."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.merges.absorb import at_home, few, take
from kvfold.ops import most_alike
from kvfold.scores import top_mask

Route = tuple[Int[Tensor, "B H T"], Float[Tensor, "B H T"]]
"""The slot where each token would go (its own for those that have nowhere to), and how similar that is (-inf)."""


def nearest(giving: Bool[Tensor, "B H T"], taking: Bool[Tensor, "B H T"], *states: Float[Tensor, "B H T _"]) -> Route:
    """For each slot of `giving` the most similar of `taking`, the earlier where they tie; padding is in neither.

    Similar is the cosine of the states, or of several kinds the product of cosines, each negative one counted as 0.
    """
    givers, gives = few(giving)
    takers, takes = few(taking)
    home = at_home(giving)
    similarity = torch.full(giving.shape, -torch.inf, device=giving.device, dtype=torch.float32)
    if not givers.shape[2] or not takers.shape[2]:
        return home, similarity
    given, near = ([F.normalize(take(x, slots).float(), dim=-1) for x in states] for slots in (givers, takers))
    best, first = most_alike(given, near, gives.sum(-1), takes.sum(-1))
    # Those that fill up a short head write what is there already: all of them differ.
    goes = gives & takes.any(-1, keepdim=True)
    home.scatter_(2, givers, torch.where(goes, takers.gather(2, first), home.gather(2, givers)))
    similarity.scatter_(2, givers, torch.where(goes, best, -torch.inf))
    return home, similarity


def nearest_place(
    positions: Int[Tensor, "B H T"], giving: Bool[Tensor, "B H T"], taking: Bool[Tensor, "B H T"]
) -> Int[Tensor, "B H T"]:
    """Each slot's home: for those of `giving` the slot of `taking` next to them in the text, the earlier at a tie."""
    slots, last = at_home(giving), giving.shape[-1] - 1
    before = torch.where(taking, slots, -1).cummax(-1).values
    behind = torch.where(taking, slots, last + 1).flip(-1).cummin(-1).values.flip(-1)
    here, never = positions.long(), torch.iinfo(torch.int64).max
    back = (here - here.gather(-1, before.clamp(min=0))).masked_fill(before < 0, never)
    ahead = (here.gather(-1, behind.clamp(max=last)) - here).masked_fill(behind > last, never)
    near = torch.where(back <= ahead, before, behind)
    return torch.where(giving & taking.any(-1, keepdim=True), near, slots)


def soft_match(
    keys: Float[Tensor, "B H T D"],
    among: Bool[Tensor, "B H T"],
    chunk: int,
    count: Int[Tensor, "B H"],
) -> Int[Tensor, "B H T"]:
    """Each slot's home after one round of bipartite matching within chunks (Chelsea, arXiv:2506.11418).

    Tokens of `among`, side by side, are cut into chunks and split alternately: every even one picks the odd one with
    the largest cosine (the earlier where they tie), and the `count` best pairs of a head join.
    """
    slots, here = few(among)
    b, h, n = slots.shape
    if n < 2:
        return at_home(among)
    chunk = min(chunk, n + n % 2)
    slots, here = F.pad(slots, (0, -n % chunk)), F.pad(here, (0, -n % chunk), value=False)
    unit = F.normalize(take(keys, slots).float(), dim=-1).view(b, h, -1, chunk, keys.shape[-1])
    cosine = (unit[..., ::2, :] @ unit[..., 1::2, :].mT).nan_to_num(-2.0)  # B H C A B; what is no number comes last
    pairs = here.view(b, h, -1, chunk)
    cosine = cosine.masked_fill(~(pairs[..., ::2, None] & pairs[..., None, 1::2]), -torch.inf)
    best = cosine.amax(-1)
    place = torch.arange(cosine.shape[-1], device=keys.device)
    first = torch.where(cosine == best[..., None], place, cosine.shape[-1]).amin(-1).clamp(max=cosine.shape[-1] - 1)
    join = top_mask(best.flatten(2), count).view(best.shape)
    odd = slots.view(pairs.shape)[..., 1::2]
    even = slots.view(pairs.shape)[..., ::2]
    target = torch.where(join, odd.gather(-1, first), even)
    home = torch.arange(among.shape[2] + 1, device=keys.device).repeat(b, h, 1)  # one behind the last: for none
    at = even.masked_fill(~pairs[..., ::2], among.shape[2])
    return home.scatter_(2, at.flatten(2), target.flatten(2))[..., :-1]
