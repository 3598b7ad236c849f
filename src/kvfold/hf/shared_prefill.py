"""One exact prefill for many caches: every layer's view goes to each of them, and each stores what it decides."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.hf.argument import with_cache
from kvfold.hf.cache import Cache
from kvfold.hf.images import image_ids
from kvfold.hf.layers import PagedLayer
from kvfold.hf.support import unwrapped
from kvfold.views import LayerView


def prefill_many(model: nn.Module, inputs: dict[str, Tensor], caches: Sequence[Cache], **kwargs: Any) -> Tensor:
    """Run the prompt once and fill all `caches` (empty, of this model) from it. Returns the logits (B, Q, V).

    The same as a forward pass for each cache, since a prompt is attended in full before a method decides what is
    stored. Raises ValueError for a cache of another model, one that has read something, or one whose method reads
    prompts in a way of its own (`Cache.shares_prefill`).
    """
    model = unwrapped(model)
    for cache in caches:
        if cache.model is not model:
            raise ValueError(f"a cache was made for another {type(cache.model).__name__} than the one that reads")
        if cache.coded_windows:
            raise ValueError(f"method={cache.method} holds windows in a format: it can't adopt another one's prefill")
        if cache.get_seq_length():
            raise ValueError(f"a cache with {cache.get_seq_length()} tokens can't adopt a prefill; it must be empty")
        if "images" in cache.method.asks and image_ids(model) and "input_ids" not in inputs:
            raise ValueError(f"method={cache.method} must know which tokens are images: give input_ids")

    def hand_out(view: LayerView) -> None:
        for cache in caches:
            cache.adopt(view, wait=True)

    base = Cache(model, "full")
    with torch.no_grad(), base.observed(hand_out):
        logits: Tensor = model(**inputs, **with_cache(model, base), **kwargs).logits
    late = any(cache.method.listens("after_prompt") for cache in caches)
    greedy = logits.argmax(-1) if late else None
    for cache in caches:
        cache.layers = [
            mine if isinstance(mine, PagedLayer) else copy.deepcopy(theirs)
            for mine, theirs in zip(cache.layers, base.layers, strict=True)
        ]
        cache.end_adoption(greedy)
    return logits
