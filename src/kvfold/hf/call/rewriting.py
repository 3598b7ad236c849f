"""What a method makes of a prompt before anybody reads it: a pre-hook rewrites the arguments of the model's call."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.hf.anatomy import has_grid_positions
from kvfold.hf.call.host import Host
from kvfold.hf.call.reading import Reading
from kvfold.hf.draft import drafter, look_ahead
from kvfold.hf.recurrence import is_recurrent
from kvfold.views import LayerView


@dataclass(frozen=True)
class Raw:
    """A prompt that no layer has seen yet, as `Method.read_order` sees it."""

    ids: Int[Tensor, "B Q"]
    valid: Bool[Tensor, "B Q"]
    model: Any
    cache_for: Callable[[Any], Host] | None = None
    """Makes an empty cache for a model."""

    def look_ahead(
        self, count: int, observe: Callable[[LayerView], None], draft: str | None = None
    ) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """At most `count` tokens that come next, greedily, and which of them count; said by the model or by `draft`.

        Whoever says them reads the prompt in a cache of its own; `observe` gets every layer's view of every pass, with
        the prompt's padding in front, and not stored.
        """
        model = self.model if draft is None else drafter(draft, self.model)
        assert self.cache_for is not None, "nobody gave a cache to look ahead with"
        return look_ahead(self.cache_for(model), self.ids, self.valid, count, observe)


def reread(cache: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Reading] | None:
    """The arguments of a call of the model with what is really to be read, and the reading after it.

    None: what was given.

    Raises ValueError where a prompt comes without ids, with labels, or under assisted decoding.
    """
    if not cache.paged or not cache.rows.listens("read_order"):
        return None
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    if len(args) > 1:
        raise ValueError(f"method={cache.method} needs the model's arguments by name, but {len(args)} came without")
    if not isinstance(ids, Tensor):
        raise ValueError(f"method={cache.method} chooses among a prompt's tokens: call the model with input_ids")
    (rows, new), width = ids.shape, cache.rows.width
    everyone = torch.ones(rows, new, dtype=torch.bool, device=ids.device)
    given = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    valid = everyone if given is None else given[:, -new:]
    order = None
    if cache.mode.listening and cache.reads_prompt(new):
        for name in ("labels", "output_hidden_states"):
            if kwargs.get(name) is not None and kwargs[name] is not False:
                raise ValueError(f"method={cache.method} chooses among a prompt's tokens: it can't give {name}")
        if cache.pending.recording:
            raise ValueError(f"method={cache.method} chooses among a prompt's tokens: no assisted decoding with it")
        order = cache.method.read_order(Raw(ids, valid, cache.model, cache.for_model))
    if order is None and cache.reading is None:
        return None
    before = cache.reading
    if before is None:
        past = everyone[:, :1].expand(-1, width) if given is None else given[:, :-new]
        before = Reading.plain(past)
    after, taken = before.read(valid, order)
    there = taken >= 0
    changed = {name: value for name, value in kwargs.items() if name != "cache_position"}
    for name in ("input_ids", "token_type_ids"):
        value = ids if name == "input_ids" else kwargs.get(name)
        if isinstance(value, Tensor) and value.shape == ids.shape:
            changed[name] = value.gather(1, taken.clamp(min=0))
    changed["attention_mask"] = after.valid.long()
    changed["position_ids"] = (before.valid.sum(1, keepdim=True) + there.cumsum(1) - 1).clamp(min=0)
    return changed, after


def placed_behind(cache: Host, module: Any, kwargs: dict[str, Any], read: Tensor) -> dict[str, Any] | None:
    """A call's arguments with the `position_ids` that nobody gave, behind what was read; None: the model makes them.

    Some hybrids of attention and recurrence (Bamba) count each call from 0 otherwise.
    """
    if not cache.rows.width or kwargs.get("position_ids") is not None or not any(map(is_recurrent, cache.layers)):
        return None
    if has_grid_positions(cache.model) or "position_ids" not in signature(type(module).forward).parameters:
        return None
    start = cache.get_query_offset()
    places = torch.arange(start, start + read.shape[1], device=read.device)
    return {**kwargs, "position_ids": places[None].expand(read.shape[0], -1)}
