"""Causal attention of a prompt over those of its keys that are admitted: by definition, and over packed keys."""

import torch
from torch import Tensor

from kvfold.ops.attend import attend, merge
from kvfold.ops.dispatch import register

BLOCK = 128


@register("causal_admitted", "naive", rank=0)
def by_definition(q: Tensor, k: Tensor, v: Tensor, admitted: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A block of queries at a time, each with its mask, in float32."""
    (b, hq, t, d), h = q.shape, k.shape[1]
    grouped = q.reshape(b, h, hq // h, t, d)
    out, lse = q.new_empty(b, h, hq // h, t, v.shape[3]), q.new_empty(b, h, hq // h, t, dtype=torch.float32)
    keys = torch.arange(t, device=q.device)
    for i in range(0, t, BLOCK):
        j = min(i + BLOCK, t)
        before, own = keys[:j] < keys[i:j, None], keys[:j] == keys[i:j, None]
        seen = (admitted[:, :, None, :j] & before) | own  # B H Q T
        logits = torch.einsum("bhgqd,bhtd->bhgqt", grouped[..., i:j, :].float(), k[:, :, :j].float()) * scale
        logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        lse[..., i:j] = logits.logsumexp(-1)
        weights = torch.exp(logits - lse[..., i:j, None])
        out[..., i:j, :] = torch.einsum("bhgqt,bhtd->bhgqd", weights, v[:, :, :j].float()).to(q.dtype)
    return out.view(b, hq, t, -1), lse.view(b, hq, t)


@register("causal_admitted", "packed", rank=10)
def packed(q: Tensor, k: Tensor, v: Tensor, admitted: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What is admitted of the blocks before lies side by side; the block itself has a mask; both answers merge."""
    (b, hq, t, d), h = q.shape, k.shape[1]
    group, grouped = hq // h, q.reshape(b, h, hq // h, t, d)
    order = torch.argsort((~admitted).byte(), dim=-1, stable=True)
    most = int(admitted.sum(-1).max())
    near = order[..., :most, None]
    keys, values = k.gather(2, near.expand(-1, -1, -1, d)), v.gather(2, near.expand(-1, -1, -1, v.shape[3]))
    before = (admitted.cumsum(-1) - admitted.long())[..., ::BLOCK]  # what each block has before it
    ends = torch.stack([before.amin((0, 1)), before.amax((0, 1))], 1).tolist()
    outs, lses = [], []
    for number, (low, high) in enumerate(ends):
        i, j = number * BLOCK, min((number + 1) * BLOCK, t)
        n = j - i
        ask = grouped[..., i:j, :].reshape(b, h, group * n, d)
        earlier = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1)
        own = torch.eye(n, dtype=torch.bool, device=q.device)
        seen = (admitted[:, :, None, i:j] & earlier) | own
        parts = [attend(ask, k[:, :, i:j], v[:, :, i:j], scale, as_bias(seen.repeat(1, 1, group, 1)))]
        if high:
            there = torch.arange(high, device=q.device) < before[..., number, None, None]  # B H 1 N
            bias = as_bias(there) if low < high else None
            parts.append(attend(ask, keys[:, :, :high], values[:, :, :high], scale, bias))
        out, lse = merge(parts)
        outs.append(out.view(b, h, group, n, -1))
        lses.append(lse.view(b, h, group, n))
    return torch.cat(outs, 3).reshape(b, hq, t, -1), torch.cat(lses, 3).reshape(b, hq, t)


def as_bias(seen: Tensor) -> Tensor:
    """What is added to the logits: nothing where `seen`, else minus infinity."""
    return torch.zeros(seen.shape, device=seen.device, dtype=torch.float32).masked_fill(~seen, -torch.inf)
