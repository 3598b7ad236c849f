"""Attention over a few stored tokens at a time, for formats whose keys and values are worked out when they are read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.ops.attend.naive import merge

Answer = tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q _"] | None]
"""Output, log-sum-exp, and what each slot got of each query where that is known."""
BLOCK_ELEMENTS = 1 << 22
"""Numbers in float32 held at once while attending: 16 MB."""


@dataclass(frozen=True)
class Block:
    """Keys and values of some slots, or what is proportional to them.

    `key_scale` multiplies a key's logit and `value_scale` a value's weight, which costs less than the vectors would.
    """

    keys: Float[Tensor, "B H T D"]
    values: Float[Tensor, "B H T Dv"]
    key_scale: Float[Tensor, "B H T"] | None = None
    value_scale: Float[Tensor, "B H T"] | None = None


def attend_blocks(
    q: Float[Tensor, "B H G Q D"],
    scale: float,
    valid: Bool[Tensor, "B H T"],
    value_size: int,
    block: Callable[[int, int], Block],
    column: Callable[[str, int, int], Tensor],
    *,
    mass: str | None,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Any = None,
    position: str = "position",
    multiple: int = 1,
    weights: bool = False,
) -> Answer:
    """Over the slots that are `valid`, and `read` where that is given: the definition of attention, block by block.

    `block(start, stop)` and `column(name, start, stop)` give what slots hold; blocks are of a `multiple` of slots. The
    column `mass`, where one is named, is added to the logits. No copy of all keys or values is ever there.
    """
    (b, h, g, n, d), size = q.shape, valid.shape[-1]
    queries = q.reshape(b, h, g * n, d).float()
    ranks = None if compact is None else valid.cumsum(-1) - 1
    seen = valid if read is None else valid & read
    asked: list[Tensor] = []
    out = queries.new_zeros(b, h, g * n, value_size)
    lse = queries.new_full((b, h, g * n), -torch.inf)
    step = max(16, BLOCK_ELEMENTS // max(1, b * h * max(g * n, d, value_size)))
    step = -(-step // multiple) * multiple
    for start in range(0, size, step):
        stop = min(start + step, size)
        some = block(start, stop)
        keys = some.keys.float()
        if compact is not None and ranks is not None:
            keys = compact.of(start, stop).rotate_keys(keys, column(position, start, stop), ranks[..., start:stop])
        logits = queries @ keys.mT
        logits *= scale if some.key_scale is None else (some.key_scale * scale)[:, :, None]
        if mass is not None:
            logits += column(mass, start, stop)[:, :, None]
        logits.masked_fill_(~seen[:, :, None, start:stop], -torch.inf)
        if weights:
            asked.append(logits)
        sums = logits.logsumexp(-1)
        share = torch.exp(logits - sums.masked_fill(sums == -torch.inf, 0.0)[..., None])
        if some.value_scale is not None:
            share *= some.value_scale[:, :, None]
        out, lse = merge([(out, lse), (share @ some.values.float(), sums)])
    left = None
    if weights:
        left = torch.exp(torch.cat(asked, -1) - lse[..., None]) if asked else out[..., :0]
        left = left.nan_to_num(0.0).view(b, h, g, n, -1)
    return out.view(b, h, g, n, -1).to(q.dtype), lse.view(b, h, g, n), left
