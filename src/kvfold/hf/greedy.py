"""Going on greedily from what a cache holds."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from kvfold.hf.argument import with_cache
from kvfold.hf.call.host import Host

LOOK = 8
"""Steps between two looks at whether every row has ended: each look waits for the device."""
Drafted = tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]
"""Tokens, and which of them count: a row ends with the token that ends an answer, which still does."""


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Tokens that end an answer."""
    said = getattr(model, "generation_config", None) or model.config.get_text_config(decoder=True)
    end = getattr(said, "eos_token_id", None)
    return set() if end is None else {end} if isinstance(end, int) else set(end)


@torch.no_grad()
def go_on(
    model: PreTrainedModel, cache: Host, first: Int[Tensor, "B 1"], mask: Bool[Tensor, "B W"], count: int
) -> Drafted:
    """`first`, and what `model` says after it: at most `count` tokens. `mask`: which columns read so far are tokens.

    Where somebody observes, what is fed to a row that has ended is padding: no query of its views.
    """
    ids, position = [first], mask.sum(1, keepdim=True)
    ends = torch.tensor(sorted(end_tokens(model)), dtype=first.dtype, device=first.device)
    watched, over = len(ends) > 0 and cache.mode.observe is not None, torch.isin(first, ends)
    masked = watched or not bool(mask.all())
    for step in range(1, count):
        if len(ends) and (watched or step % LOOK == 0) and bool(over.all()):
            break
        if masked:
            mask = torch.cat([mask, ~over if watched else torch.ones_like(over)], 1)
        given = {"attention_mask": mask.long()} if masked else {}
        out = model(input_ids=ids[-1], position_ids=position, logits_to_keep=1, **with_cache(model, cache), **given)
        ids.append(out.logits[:, -1:].argmax(-1))
        over = over | torch.isin(ids[-1], ends)
        position = position + 1
    said = torch.cat(ids, 1)[:, :count]
    ended = torch.isin(said, ends).long()
    valid = ended.cumsum(1) - ended == 0
    longest = int(valid.sum(1).max()) if count else 0
    return said[:, :longest], valid[:, :longest]
