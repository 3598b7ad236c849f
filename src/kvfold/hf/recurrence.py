"""Recurrent states: whether a model that reads several tokens at once goes on from those that a cache holds."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvfold.hf.anatomy import text_decoder
from kvfold.hf.argument import with_cache
from kvfold.hf.looking import ids_device, is_offloaded

_known: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


class _StateSeen(Exception):
    """A layer has given its new state: the rest of the pass is of no interest."""


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds a recurrent state."""
    states: dict[int, Any] = getattr(layer, "recurrent_states", None) or {}
    return len(states) > 0 and any(state is not None for state in states.values())


def carries_state(model: Any) -> bool:
    """Whether a pass of several tokens goes on from a recurrent state, instead of starting anew.

    Found once for a model: two tokens are read, the state that they leave is spoiled, and two more are read. A new
    state that is not spoiled did not come from the old one. Each pass ends at the first layer with a state, but where
    accelerate brings weights for a pass and takes them away behind it: there it must come to its end.
    """
    if model not in _known:
        _known[model] = _carries_state(model)
    return _known[model]


@torch.no_grad()
def _carries_state(model: Any) -> bool:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer in cache.layers:
        if hasattr(layer, "update_recurrent_state") and not is_offloaded(model):
            layer.update_recurrent_state = _then_stop(layer.update_recurrent_state)
    for _ in range(2):
        for layer in cache.layers:
            for number, state in getattr(layer, "recurrent_states", {}).items():
                if state is not None:
                    layer.recurrent_states[number] = torch.full_like(state, torch.nan)
        _read_two(model, cache)
    states = [x for layer in cache.layers for x in getattr(layer, "recurrent_states", {}).values() if x is not None]
    return all(bool(state.isnan().any()) for state in states)


def _read_two(model: Any, cache: DynamicCache) -> None:
    decoder = text_decoder(model)
    ids = torch.zeros(1, 2, dtype=torch.long, device=ids_device(model))
    try:
        decoder(input_ids=ids, **with_cache(decoder, cache), use_cache=True)
    except _StateSeen:
        return


def _then_stop(update: Any) -> Any:
    """`update_recurrent_state` of a layer, with nothing of the pass behind it."""

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        update(*args, **kwargs)
        raise _StateSeen

    return wrapped
