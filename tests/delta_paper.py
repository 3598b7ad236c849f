"""DELTA by the paper's words: what six layers give with transformers' own cache, and the method that must give it."""

from functools import lru_cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvfold.methods.delta import Delta
from models import build

FULL = (0, 1, 3)
"""Of six layers: 0 is plain, 1 chooses for 2, and 3 for 4 and 5."""
METHOD = Delta(64, FULL, page=8, recent=16)


@lru_cache(maxsize=1)
def six() -> PreTrainedModel:
    """Six layers, for kvfold."""
    return build("llama", num_hidden_layers=6)


@lru_cache(maxsize=1)
def paper() -> PreTrainedModel:
    """The same weights with the paper's attention: 8 pages of 8, of which 2 are recent."""
    AttentionInterface.register("delta-paper", by_definition((None, 1, 1, 3, 3, 3), 8, 8, 2))
    AttentionMaskInterface.register("delta-paper", sdpa_mask)
    model = build("llama", num_hidden_layers=6)
    model.set_attn_implementation("delta-paper")
    return model


def by_definition(roles: tuple[int | None, ...], room: int, page: int, last: int):
    """Attention of transformers' cache in which layers read what DELTA says, in float64, from the paper's words."""
    chosen: dict[int, torch.Tensor] = {}

    def attend(module, query, key, value, mask, **kwargs):
        layer, source = module.layer_idx, roles[module.layer_idx]
        if query.shape[2] > 1 or source is None:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        group, t = query.shape[1] // key.shape[1], key.shape[2]
        k, v = (x.repeat_interleave(group, 1).double() for x in (key, value))
        logits = (query.double() @ k.mT)[:, :, 0] * kwargs["scaling"]
        real = torch.ones(len(query), t, dtype=torch.bool) if mask is None else mask[:, 0, 0, :t]
        logits = logits.masked_fill(~real[:, None], -torch.inf)
        if source == layer:
            chosen[layer] = torch.stack(
                [pages(p[:, r], room, page, last) for p, r in zip(logits.softmax(-1), real, strict=True)]
            )
        elif source is not None:
            read = real.clone()
            for row, own in enumerate(real):
                read[row, own] = chosen[source][row][torch.arange(int(own.sum())) // page]
            logits = logits.masked_fill(~read[:, None], -torch.inf)
        out = logits.softmax(-1)[:, :, None] @ v
        return out.transpose(1, 2).to(query.dtype), None

    def pages(p: torch.Tensor, room: int, page: int, last: int) -> torch.Tensor:
        number = -(-p.shape[-1] // page)
        worth = [float(some.sum()) for some in p.amax(0).split(page)]
        flags = torch.zeros(1024, dtype=torch.bool)
        if number <= room:
            flags[:number] = True
            return flags
        flags[number - last : number] = True
        for n in sorted(range(number - last), key=lambda n: (-worth[n], n))[: room - last]:
            flags[n] = True
        return flags

    return attend
