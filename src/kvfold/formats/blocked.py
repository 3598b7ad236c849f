"""Attention over a few stored tokens at a time, for formats whose keys and values are worked out when they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.tokens import LOG_MASS, POSITION
from kvfold.rotation import Compact

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
    mass: bool,
    read: Bool[Tensor, "B H T"] | None = None,
    compact: Compact | None = None,
    multiple: int = 1,
    weights: bool = False,
) -> Answer:
    """Over the slots that are `valid`, and `read` where that is given: the definition of attention, block by block.

    `block(start, stop)` and `column(name, start, stop)` give what slots hold; blocks are of a `multiple` of slots. With
    `mass` the column `LOG_MASS` is added to the logits. No copy of all keys or values is ever there.
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
            keys = compact.of(start, stop).rotate_keys(keys, column(POSITION, start, stop), ranks[..., start:stop])
        logits = queries @ keys.mT
        logits *= scale if some.key_scale is None else (some.key_scale * scale)[:, :, None]
        if mass:
            logits += column(LOG_MASS, start, stop)[:, :, None]
        logits.masked_fill_(~seen[:, :, None, start:stop], -torch.inf)
        if weights:
            asked.append(logits)
        sums = logits.logsumexp(-1)
        share = torch.exp(logits - sums.masked_fill(sums == -torch.inf, 0.0)[..., None])
        if some.value_scale is not None:
            share *= some.value_scale[:, :, None]
        out, lse = ops.merge([(out, lse), (share @ some.values.float(), sums)])
    left = None
    if weights:
        left = torch.exp(torch.cat(asked, -1) - lse[..., None]) if asked else out[..., :0]
        left = left.nan_to_num(0.0).view(b, h, g, n, -1)
    return out.view(b, h, g, n, -1).to(q.dtype), lse.view(b, h, g, n), left


@runtime_checkable
class Answering(Protocol):
    """What answers for some of the slots: a segment, or a piece of one."""

    @property
    def longest(self) -> int:
        """Slots of the longest row."""
        ...

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> Answer:  # fmt: skip
        """See `Segment.attend`."""
        ...


def attend_parts(
    parts: Sequence[Answering], q: Float[Tensor, "B H G Q D"], scale: float, read: Bool[Tensor, "B H T"] | None,
    compact: Compact | None, *, weights: bool,
) -> Answer:  # fmt: skip
    """Over segments whose slots follow each other, as one; empty ones are not asked, but for the last of empty ones."""
    found, start = list[Answer](), 0
    for part in parts:
        stop = start + part.longest
        if stop > start or (part is parts[-1] and not found):
            here = None if read is None else read[..., start:stop]
            turn = None if compact is None else compact.of(start, stop)
            found.append(part.attend(q, scale, read=here, compact=turn, weights=weights))
        start = stop
    return merged(found, weights=weights)


def merged(parts: Sequence[Answer], *, weights: bool) -> Answer:
    """Partial answers over slots that follow each other as one; weights of all of them, None where one has none."""
    if len(parts) == 1:
        return parts[0]
    out, lse = ops.merge([part[:2] for part in parts])
    lefts = [part[2] for part in parts if part[2] is not None]
    if not weights or len(lefts) < len(parts):
        return out, lse, None
    shares = [torch.exp(own - lse).nan_to_num(0.0)[..., None] for _, own, _ in parts]
    return out, lse, torch.cat([left * share for left, share in zip(lefts, shares, strict=True)], -1)
