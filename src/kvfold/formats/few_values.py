"""A query that meets every key of a segment, and reads the values of few tokens."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats.index import Weighing
from kvfold.formats.parts import Answer
from kvfold.formats.segment import Segment


def attend_values(
    segment: Segment, q: Float[Tensor, "B H G 1 D"], scale: float, selection: Weighing, seen: Int[np.ndarray, " B"], *,
    weights: bool = False,
) -> Answer:  # fmt: skip
    """(out, lse, what each slot got), where tokens that are not chosen have a part in the softmax, and none in `out`.

    So weights are those of full attention and sum to less than 1, and so does what a later merge makes of them. Where
    the selection renormalises, they are over the chosen ones alone, and `lse` is. Rows and heads that read all get what
    `attend` gives, bit for bit.
    """
    counts = segment.counts()
    some = selection.chooses(counts, seen)
    if not some.any():
        return segment.attend(q, scale, weights=weights)
    out, lse, left = segment.attend(q, scale, weights=True)
    if left is None:
        raise NotImplementedError(f"{type(segment).__name__} does not say what its slots get: no choice of values")
    tokens = segment.dense()
    chosen = selection.weigh(left[:, :, :, 0], tokens.valid, seen)
    (b, h, g, _, t), lists = left.shape, chosen.shape[2]
    shares = left.view(b, h, lists, g // lists, t) * chosen[:, :, :, None]
    most = int(chosen.sum(-1).max())
    slots = torch.argsort(chosen.byte(), dim=-1, descending=True, stable=True)[..., :most]  # B H S N
    values = tokens.values[:, :, None].expand(b, h, lists, t, -1)
    values = values.gather(3, slots[..., None].expand(*slots.shape, values.shape[-1]))
    near = shares.gather(-1, slots[:, :, :, None].expand(b, h, lists, g // lists, most))
    part = (near @ values.float().masked_fill(~chosen.gather(-1, slots)[..., None], 0.0)).view(b, h, g, 1, -1)
    total = shares.sum(-1).view(b, h, g, 1)
    ours = torch.from_numpy(some).to(q.device)[:, :, None, None]
    kept = shares.view(b, h, g, 1, t)
    if selection.renormalize:
        part, kept, norm = part / total[..., None], kept / total[..., None], lse + total.log()
    else:
        norm = lse
    got = torch.where(ours[..., None], kept, left) if weights else None
    return torch.where(ours[..., None], part.to(out.dtype), out), torch.where(ours, norm, lse), got
