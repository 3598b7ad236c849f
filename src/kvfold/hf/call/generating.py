"""`generate` and its cache: the ids that it gives go on where those end that were read; with it ends its drafting."""

from typing import Any

from torch import Tensor

from kvfold.hf.argument import NEW, OLD, cache_in, with_cache
from kvfold.hf.call.modes import Modal
from kvfold.hf.standing import StandIn, stand


class Comparing(StandIn):
    """`generate` of one model, which compares the ids that it gets with those that its cache has read.

    An assisted decoding that began in it is over with it: what comes next is not cropped.
    """

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs"))
        cache, ids = cache_in(kwargs), next((x for x in given if x is not None), None)
        if not isinstance(cache, Modal):
            return self.original(*args, **kwargs)
        if isinstance(ids, Tensor):
            _check(cache, ids, kwargs.get("attention_mask"))
        if kwargs.get(NEW) is None:  # by the name that this transformers wants: the older makes it warn
            kwargs = {name: each for name, each in kwargs.items() if name not in (OLD, NEW)}
            kwargs |= with_cache(self.module, cache)
        recorded = cache.pending.recording  # then others crop, who go on when this call is over
        made = self.original(*args, **kwargs)
        if cache.pending.recording and not recorded:
            cache.stop_recording()
        return made


def watch_generation(model: Any) -> None:
    """See to it that `generate` compares, before the model is called."""
    stand(Comparing, model)


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


def cut(cache: Any, ids: Any, kwargs: dict[str, Any]) -> None:
    """Say what is new of the first pass of an assisted decoding: transformers does not, and would read all again."""
    if not (isinstance(cache, Modal) and isinstance(ids, Tensor)):
        return
    if kwargs.get("is_first_iteration") and cache.pending.opening:
        before, mask = cache.get_seq_length(), kwargs.get("attention_mask")
        whole = mask is None or mask.shape[1] == ids.shape[1]
        if whole and 0 < before < ids.shape[1] and cache.given.begins(ids, before):
            kwargs["next_sequence_length"] = ids.shape[1] - before
