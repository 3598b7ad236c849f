"""From scores to kept tokens: smoothing along the sequence, and top-k with stable ties."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.ops import top_mask
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep

FEW = 3
"""Tokens of a head that are looked for one by one."""


def smooth(scores: Float[Tensor, "B H T"], kernel: int, pool: str = "avg") -> Float[Tensor, "B H T"]:
    """Each score becomes the mean (or maximum) of the `kernel` scores around it, zeros beyond both ends."""
    if kernel == 1:
        return scores
    if pool == "max":
        kernel = min(kernel, 2 * scores.shape[-1] + 1)  # further on there is nothing
        return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)


def keep_top(
    view: LayerView,
    scores: Float[Tensor, "B H T"],
    count: Int[Tensor, "B H"],
    always: Bool[Tensor, "B H T"] | None = None,
) -> Keep:
    """Keep the `count` tokens with the highest scores; those of `always` come first of all and count too."""
    return Keep(top_mask(ranked(view, scores, always), count.to(scores.device)))


def ranked(
    view: LayerView, scores: Float[Tensor, "B H T"], always: Bool[Tensor, "B H T"] | None = None
) -> Float[Tensor, "B H T"]:
    """Scores as `top_mask` wants them: inf for those of `always`, -inf for empty slots, and for no other.

    So that no head is left with less than it may keep: NaN counts as the lowest number, what overflowed as the
    largest, -inf as the lowest.
    """
    low, high = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(low, posinf=high, neginf=low)
    if always is not None:
        scores = scores.masked_fill(always, torch.inf)
    return scores.masked_fill(~view.valid, -torch.inf)


def drop_lowest(
    view: LayerView,
    scores: Float[Tensor, "B H T"],
    count: Int[Tensor, "B H"],
    always: Bool[Tensor, "B H T"] | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> Keep | Drop:
    """What `keep_top` keeps, with `columns`; where only a few tokens go, as at a decode step, by those."""
    columns, slots = {} if columns is None else columns, None
    over = view.count - count.to(view.count.device)
    least, most = map(int, over.aminmax())
    if most <= FEW:
        stays = ~view.valid if always is None else ~view.valid | always
        slots = _lowest(scores.masked_fill(stays, torch.inf), max(0, most))
    if slots is None:
        return Keep(keep_top(view, scores, count, always).mask, columns)
    if least < most:
        slots = slots.masked_fill(torch.arange(slots.shape[-1], device=slots.device) >= over[..., None], -1)
    return Drop(slots, columns)


def _lowest(scores: Float[Tensor, "B H T"], number: int) -> Int[Tensor, "B H N"] | None:
    """The slots of the lowest scores, of those that tie the later first; None where these are not numbers."""
    if not number:
        none = torch.empty(*scores.shape[:2], 0, dtype=torch.int64, device=scores.device)
        return none if float(scores.amin()) > -torch.inf else None
    slots: list[Tensor] = []
    while True:
        low, back = scores.flip(-1).min(-1, keepdim=True)  # the first of those that tie
        if not math.isfinite(float(low.sum())):
            return None
        slots.append(scores.shape[-1] - 1 - back)
        if len(slots) == number:
            return slots[0] if number == 1 else torch.cat(slots, -1)
        scores = scores.scatter(-1, slots[-1], torch.inf)


def drop_from(view: LayerView, first: Int[Tensor, "B H"], number: Int[Tensor, "B H"]) -> Drop:
    """Drop `number` tokens of each (row, head), from its how-manieth `first` on; for a step at which few go.

    There must be as many there.
    """
    least, most = map(int, number.aminmax())
    which = torch.arange(max(0, most), device=number.device)
    slots = torch.searchsorted(view.rank.contiguous(), first[..., None] + which)
    return Drop(slots if least == most else slots.masked_fill(which >= number[..., None], -1))
