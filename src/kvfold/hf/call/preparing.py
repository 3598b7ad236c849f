"""What a model's `generate` makes of a cache before each of its calls: a model that drops the one it was given.

Phi-3 and its kin have two tables of rotations, for short texts and long ones. When a text outgrows the first, what was
read with it is worth nothing: their `prepare_inputs_for_generation` drops the cache and has the whole text read again.
So does it before a long text is read at all. transformers then makes a cache of its own, in silence.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kvfold.hf.argument import cache_in, name_of
from kvfold.hf.call.generating import cut
from kvfold.hf.call.host import Host
from kvfold.hf.standing import StandIn, stand


class Preparing(StandIn):
    """`prepare_inputs_for_generation` of one model, after which its call has the cache that `generate` was given."""

    name = "prepare_inputs_for_generation"

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        given, ids = cache_in(kwargs), kwargs.get("input_ids", args[0] if args else None)
        if len(args) < 2:
            cut(given, ids, kwargs)
        made: dict[str, Any] = self.original(*args, **kwargs)
        if isinstance(given, Host) and cache_in(made) is not given:
            keep(given, made, ids.shape[1] if isinstance(ids, Tensor) else 0)
            made[name_of(type(self.module).forward)] = given
        return made


def keep(cache: Host, made: dict[str, Any], length: int) -> None:
    """A call was prepared without the cache: let the cache read its text anew, if the call brings all of it.

    Raises RuntimeError where it does not, and where something waits in the cache that reading anew would lose.
    """
    read = cache.get_seq_length()
    if not read:
        return
    name, ids = type(cache.model).__name__, made.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[1] != length or length < read:
        raise RuntimeError(
            f"{name} drops the cache that it was given after {read} tokens, and does not read its text again: what the "
            "cache holds would be lost in silence"
        )
    if cache.pending.recording or len(cache.rows.groups) > 1:
        raise RuntimeError(
            f"{name} drops the cache that it was given after {read} tokens and reads its text again, which can't be "
            "under assisted decoding, nor with rows that have different methods"
        )
    mode = cache.mode
    cache.reset()
    cache.mode = mode


def watch_preparing(model: PreTrainedModel) -> None:
    """See to it that `generate` keeps the cache that it is given."""
    stand(Preparing, model)


__all__ = ["Preparing", "keep", "watch_preparing"]
