"""Layer views without a model: random ones, planted ones, and ones whose attention is what a test says."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvfold import ops
from kvfold.formats import POSITION, Chunk
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Plan
from kvfold.layer.rows import Rows
from kvfold.methods import Method
from kvfold.methods.base import decided
from kvfold.views import LayerView, Place, Queries
from kvfold.views.decisions import Keep


def place(prompt: Tensor, seen: Tensor | None = None, **options: Any) -> Place:
    """Layer 0 of a model of one layer, unless `options` say otherwise."""
    given: dict[str, Any] = {"layer": 0, "ordinal": 0, "paged": (0,), "depth": 1, "scale": 1.0} | options
    return Place(prompt=prompt, seen=prompt if seen is None else seen, **given)


def prompt_view(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, **options: Any
) -> LayerView:
    """The view after a prompt: q (B, Hq, T, D), k, v (B, H, T, D), mask (B, T) False where padding is."""
    b, h, t, d = k.shape
    mask = torch.ones(b, t, dtype=torch.bool) if mask is None else mask
    scale = d**-0.5 if scale is None else scale
    lse = torch.full(q.shape[:3], -torch.inf)
    for row in range(b):
        here = mask[row].nonzero()[:, 0]
        one = slice(row, row + 1)
        lse[one, :, here] = ops.causal(q[one, :, here], k[one, :, here], v[one, :, here], scale)[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0).int()
    columns = {POSITION: positions[:, None].repeat(1, h, 1)}
    chunk = Chunk(k, v, mask[:, None].repeat(1, h, 1), columns)
    return LayerView(chunk, Queries(q, mask, lse, positions), place(mask.sum(1), scale=scale, **options))


def random_view(
    B: int = 1, H: int = 1, G: int = 1, T: int = 16, D: int = 8, left_pad: Sequence[int] = (), seed: int = 0,
    dtype: torch.dtype = torch.float32, **options: Any,
) -> LayerView:  # fmt: skip
    """A prompt of random tokens; row b starts with `left_pad[b]` slots of padding."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, heads, T, D, generator=rng).to(dtype) for heads in (H * G, H, H))
    pads = torch.tensor([*left_pad, *[0] * (B - len(left_pad))])
    return prompt_view(q, k, v, torch.arange(T) >= pads[:, None], **options)


def plant(view: LayerView, at: int, asked_by: slice, strength: float = 12.0) -> LayerView:
    """The same view, but the queries `asked_by` look at the key in slot `at` more than at any other."""
    q, k = view.queries.states.clone(), view.keys.clone()
    needle = torch.zeros(k.shape[-1], dtype=k.dtype)
    needle[0] = (strength / view.place.scale) ** 0.5
    k[..., 0] = 0.0
    k[:, :, at] = needle
    q[:, :, asked_by] = needle
    old = view.place
    options = {"layer": old.layer, "ordinal": old.ordinal, "paged": old.paged, "depth": old.depth}
    return prompt_view(q, k, view.values, view.queries.valid, old.scale, **options)


def asked_view(logits: Tensor, queries: int = 1, **options: Any) -> LayerView:
    """A view whose last `queries` queries have the logits (B, H, G, queries, T); keys are unit vectors.

    The softmax of a query is that of its logits over the tokens that it sees.
    """
    b, h, g, n, t = logits.shape
    q = torch.zeros(b, h * g, t, t)
    q[:, :, t - n :] = logits.reshape(b, h * g, n, t)
    k = torch.eye(t).expand(b, h, t, t).contiguous()
    return prompt_view(q, k, k, scale=1.0, **options)


def step_view(view: LayerView, kept: Keep, logits: Tensor) -> LayerView:
    """What a method sees at the next generated token, whose query has `logits` (Hq, n) over the kept tokens and it."""
    n = logits.shape[-1]
    h, position = view.heads, int(view.place.seen[0])
    alive = view.apply(kept).valid
    names = {**view.columns, **kept.columns}
    new = {POSITION: torch.full((1, h, 1), position, dtype=torch.int32)}
    columns = {}
    for name, column in names.items():
        stored = column[alive].view(1, h, n - 1)
        columns[name] = torch.cat([stored, new.get(name, torch.zeros(1, h, 1, dtype=column.dtype))], 2)
    k = torch.eye(n).expand(1, h, n, n).contiguous()
    chunk = Chunk(k, k, torch.ones(1, h, n, dtype=torch.bool), columns)
    q = logits[None, :, None]
    at = torch.tensor([[position]], dtype=torch.int32)
    queries = Queries(q, torch.ones(1, 1, dtype=torch.bool), logits.logsumexp(-1)[None, :, None], at)
    return LayerView(chunk, queries, replace(view.place, seen=view.place.seen + 1, scale=1.0))


def kept(method: Method, view: LayerView, event: str = "after_prefill") -> list[list[list[int]]]:
    """Text positions that the method leaves, kept[row][head]."""
    for decision in decided(getattr(method, event)(view)):
        view = view.apply(decision)
    return [
        [view.positions[b, h][view.valid[b, h]].tolist() for h in range(view.heads)] for b in range(view.valid.shape[0])
    ]


def after_all(view: LayerView, method: Method) -> LayerView:
    """The view after what the method decides at the end of a prompt."""
    for decision in decided(method.after_prefill(view)):
        view = view.apply(decision)
    return view


def run(
    method: Method, q: Tensor, k: Tensor, v: Tensor, chunks: Iterable[int], mask: Tensor | None = None, **layer: Any
) -> tuple[KVLayer, list[Tensor]]:
    """A KVLayer fed with q, k, v in chunks (the first is a prompt, and every one of more than one token)."""
    cache, outs, start = KVLayer(Rows(method), 0, **layer), [], 0
    for size in chunks:
        here = slice(start, start + size)
        valid = None if mask is None else mask[:, here]
        this = Plan(prefill=size > 1 or start == 0)
        outs.append(cache.attend(q[:, :, here], k[:, :, here], v[:, :, here], valid, q.shape[-1] ** -0.5, this))
        start += size
    return cache, outs


def row_of(view: LayerView, row: int) -> LayerView:
    """One row of a batch without its padding, as if it had been read alone."""
    here, one = view.queries.valid[row], slice(row, row + 1)
    q = view.queries.states[one, :, here]
    options = {name: getattr(view.place, name) for name in ("layer", "ordinal", "paged", "depth", "scale")}
    return prompt_view(q, view.keys[one, :, here], view.values[one, :, here], **options)


def full_probabilities(view: LayerView, row: int) -> Tensor:
    """Causal attention (Hq, T, T) of one row without its padding, by torch.softmax on the full matrix."""
    alone = row_of(view, row)
    q, k = alone.queries.states[0].float(), alone.keys[0].float()
    k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
    logits = q @ k.transpose(-1, -2) * view.place.scale
    t = logits.shape[-1]
    return logits.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).softmax(-1)


def top(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` highest scores, the earlier one where they tie, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def spared(total: int, count: int, window: int, sinks: int = 0) -> list[int]:
    """Of `total` tokens, those that are among the `count` that stay whatever their score; both ends without room."""
    if count < window + max(sinks, min(4, window // 2)):
        sinks = min(count // 2, max(sinks, 4))
        window = count - sinks
    return sorted({*range(min(sinks, total)), *range(max(0, total - window), total)})
