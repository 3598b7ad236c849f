"""The logits of queries, a block of them at a time: for scores that need more than what each key got in all."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import LOG_MASS
from kvfold.views import LayerView

BLOCK_ELEMENTS = 1 << 24
"""Logits held at once."""

Rows = tuple[Int[Tensor, "B W"], Bool[Tensor, "B H W K"], Float[Tensor, "B H G W K"]]


def logit_rows(view: LayerView, window: int | None = None) -> Iterator[Rows]:
    """Blocks of each row's last `window` queries (None: of all), in their order: (asked at, seen, logits).

    Text positions of the queries (-1: padding), which of the first K slots each one sees, and its logits there:
    float32, up to a constant of each query, -inf where it sees nothing. K is what the block reaches.
    """
    (b, hq, n, d), h, t = view.queries.states.shape, view.heads, view.keys.shape[2]
    w = n if window is None else min(window, n)
    asked = view.queries.last(w) if w < n else view.queries
    in_place = w == n and view.queries.start is None  # query i's own token is in slot t - n + i
    keys, bias = None, view.columns.get(LOG_MASS)
    size = max(1, min(64, BLOCK_ELEMENTS // max(1, b * hq * t)))
    for start in range(0, w, size):
        block = slice(start, min(start + size, w))
        k = t - n + block.stop if in_place else t
        asked_at = asked.positions[:, block].masked_fill(~asked.valid[:, block], -1)
        seen = (view.positions[:, :, None, :k] <= asked_at[:, None, :, None]) & view.valid[:, :, None, :k]
        if n == 1:
            logits = view.attention(1).clamp(min=torch.finfo(torch.float32).tiny).log()  # the step's kernel left it
        else:
            keys = view.keys.float() if keys is None else keys
            grouped = asked.states[:, :, block].float().reshape(b, h, hq // h, -1, d) * view.place.scale
            logits = (grouped.flatten(2, 3) @ keys[:, :, :k].mT).view(b, h, hq // h, -1, k)
            logits = logits if bias is None else logits + bias[:, :, None, None, :k]
        yield asked_at, seen, logits.masked_fill(~seen[:, :, None], -torch.inf)
