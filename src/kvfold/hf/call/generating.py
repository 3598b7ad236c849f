"""What `generate` gives a cache: ids that go on where those end which the cache has read, or ValueError."""

from functools import wraps
from types import MethodType
from typing import Any

from torch import Tensor

from kvfold.hf.argument import cache_in
from kvfold.hf.call.modes import Modal

GENERATE, PREPARE = "generate", "prepare_inputs_for_generation"


def watch_generation(model: Any) -> None:
    """Let `generate` compare the ids that it gets with those that its cache has read, before the model is called."""
    # Each is named as the method that it stands before: so a pickled model has the method itself there.
    for name, wrapped in ((GENERATE, _compared), (PREPARE, _cut)):
        if hasattr(model, name) and name not in vars(model):
            setattr(model, name, MethodType(wrapped(getattr(type(model), name)), model))


def _compared(original: Any) -> Any:
    @wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs"))
        cache, ids = cache_in(kwargs), next((x for x in given if x is not None), None)
        if isinstance(cache, Modal) and isinstance(ids, Tensor):
            _check(cache, ids, kwargs.get("attention_mask"))
        return original(self, *args, **kwargs)

    return generate


def _check(cache: Modal, ids: Tensor, mask: Any) -> None:
    """ValueError where `ids` are a text that does not go on from what the cache has read."""
    before = cache.get_seq_length()
    if not before or (isinstance(mask, Tensor) and mask.shape[1] > ids.shape[1]):
        return  # a mask that is longer: what comes is new
    at = cache.given.differs(ids) if cache.given.width == before else None
    if at is not None or ids.shape[1] <= before:
        what = f"differ from them at column {at}" if at is not None else "have nothing behind them"
        raise ValueError(
            f"the cache has read {before} tokens, and input_ids of {ids.shape[1]} {what}: pass the whole text so far "
            "and what comes next (or that alone, with an attention_mask over all); before another text call "
            "cache.reset(), or go on with a cache.fork() of an earlier point"
        )


def _cut(original: Any) -> Any:
    @wraps(original)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache = cache_in(kwargs)
        # Assisted decoding does not say what is new of its first pass: transformers would read all again.
        if isinstance(cache, Modal) and not args and kwargs.get("is_first_iteration") and cache.pending.opening:
            before, mask = cache.get_seq_length(), kwargs.get("attention_mask")
            whole = mask is None or mask.shape[1] == input_ids.shape[1]
            if whole and 0 < before < input_ids.shape[1] and cache.given.begins(input_ids, before):
                kwargs["next_sequence_length"] = input_ids.shape[1] - before
        return original(self, input_ids, *args, **kwargs)

    return prepare_inputs_for_generation
