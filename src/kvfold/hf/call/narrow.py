"""Layers that see only some of a prompt's tokens: hidden states, positions and masks shrink between two layers."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.hf.call.host import Host
from kvfold.hf.layers import WindowLayer
from kvfold.layer.plan import Narrow


def before_layer(
    cache: Host, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of decoder layer `index` for the tokens that get so far; None: as they are."""
    plan, window = cache.call.plan, cache.window(index)
    narrow = None if plan is None or plan.narrow is None or index <= plan.narrow.after else plan.narrow
    if narrow is None and (window is None or window.places is None):
        return None
    if not args or not isinstance(kwargs.get("position_embeddings"), tuple):
        raise ValueError(
            f"method={cache.method} narrows a prompt between layers, and the layers of {type(cache.model).__name__} "
            "are not called with hidden states and position_embeddings"
        )
    changed = dict(kwargs)
    states = args[0]
    if narrow is not None:
        if index == narrow.after + 1:
            states = _pick(states, narrow.columns)
        changed["position_embeddings"] = tuple(_pick(part, narrow.columns) for part in kwargs["position_embeddings"])
        if isinstance(kwargs.get("position_ids"), Tensor):
            changed["position_ids"] = _pick(kwargs["position_ids"], narrow.columns)
        changed["attention_mask"] = None if bool(narrow.valid.all()) else narrow.valid.to(states.device)
    if window is not None:
        changed["attention_mask"] = _window_mask(cache, window, states, narrow, kwargs)
    return (states, *args[1:]), changed


def _pick(x: Tensor, columns: Int[Tensor, "B N"]) -> Tensor:
    """Columns of a (B or 1, T, ...) tensor, row by row, on its device: layers may lie on several."""
    columns = columns.to(x.device)
    wide = columns.view(*columns.shape, *[1] * (x.dim() - 2)).expand(*columns.shape, *x.shape[2:])
    picked: Tensor = x.expand(len(columns), *x.shape[1:]).gather(1, wide)
    return picked


def _window_mask(
    cache: Host, layer: WindowLayer, states: Tensor, narrow: Narrow | None, kwargs: dict[str, Any]
) -> Bool[Tensor, "B 1 N K"]:
    """Which of a window's tokens each new one sees, by text position: slots no longer stand side by side in the text.

    Also notes the positions of what the layer holds from now on.
    """
    if cache.pending.recording:
        raise ValueError(f"method={cache.method} has narrowed a window layer's text: no assisted decoding with it")
    new, padding = states.shape[1], None if cache.call.mask is None else cache.call.mask.bool().to(states.device)
    if narrow is not None:
        here = narrow.positions.long().masked_fill(~narrow.valid, -1).to(states.device)
    else:
        here = kwargs["position_ids"].expand(cache.rows.batch, -1).to(states.device)
        if padding is not None:  # the caller's positions may count padding
            here = (padding.cumsum(1) - 1).masked_fill(~padding, -1)[:, -new:]
    held = layer.keys.shape[-2] if layer.is_initialized else 0
    before = layer.places
    if before is None:
        width = layer.cumulative_length
        before = torch.arange(width, device=here.device).expand(len(here), -1)
        if padding is not None:
            valid = padding[:, :width]
            before = (valid.cumsum(1) - 1).masked_fill(~valid, -1)
    there = torch.cat([before.to(here.device)[:, before.shape[1] - held :], here], 1)
    gap = here[:, :, None] - there[:, None]
    seen = (there >= 0)[:, None] & (gap >= 0) & (gap < layer.sliding_window)
    own = torch.eye(new, dtype=torch.bool, device=here.device)
    seen[:, :, held:] |= own & (here < 0)[..., None]  # padding sees itself, so that no softmax is empty
    layer.places = there[:, max(0, there.shape[1] - layer.sliding_window + 1) :]
    mask: Tensor = seen[:, None]
    return mask
