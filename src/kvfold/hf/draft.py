"""Looking ahead: the tokens that a model would say next, greedily, by the model itself or by a smaller one."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.hf.argument import with_cache
from kvfold.hf.call.host import Host
from kvfold.hf.greedy import Drafted, go_on
from kvfold.hf.looking import ids_device
from kvfold.hf.tables import kept_tables
from kvfold.hf.words import tokenizer_of
from kvfold.models.load import load
from kvfold.views import LayerView


def drafter(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """The model of this name or folder, on the device and in the dtype of `target`, loaded once in a process.

    Raises ValueError where the two do not share a vocabulary, naming both.
    """
    found = _loaded(name, str(target.device), target.dtype)
    _check_vocabulary(found, target, name)
    return found


@lru_cache(maxsize=2)
def _loaded(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    return load(name, dtype=dtype, device=device, progress=False)[0]


def _check_vocabulary(found: PreTrainedModel, target: PreTrainedModel, name: str) -> None:
    ours, theirs = (tokenizer_of(model.name_or_path) for model in (target, found))
    sizes = [model.config.get_text_config(decoder=True).vocab_size for model in (target, found)]
    same = sizes[0] == sizes[1] if ours is None or theirs is None else _words(ours) == _words(theirs)
    if not same:
        own = target.name_or_path or type(target).__name__
        raise ValueError(
            f"draft={name!r} (vocabulary of {sizes[1]}) and the model {own!r} ({sizes[0]}) must share a vocabulary"
        )


@lru_cache(maxsize=4)
def _words(tokenizer: Any) -> dict[str, int]:
    words: dict[str, int] = tokenizer.get_vocab()
    return words


@torch.no_grad()
def look_ahead(
    cache: Host,
    ids: Int[Tensor, "B Q"],
    valid: Bool[Tensor, "B Q"],
    count: int,
    observe: Callable[[LayerView], None] | None = None,
) -> Drafted:
    """At most `count` tokens that the model of an empty `cache` says after each row of `ids`, which it reads there.

    `observe` gets every layer's view of every pass: padding of the prompt stands first, and is not stored.
    """
    model = cache.model
    order, device = torch.argsort(valid.byte(), dim=1, stable=True), ids_device(model)
    ids, mask = ids.gather(1, order).to(device), valid.gather(1, order).to(device)
    with kept_tables(model), nullcontext() if observe is None else cache.observed(observe):
        given = {} if bool(mask.all()) else {"attention_mask": mask.long()}
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, position_ids=places, logits_to_keep=1, **with_cache(model, cache), **given)
        return go_on(model, cache, out.logits[:, -1:].argmax(-1), mask, count)
