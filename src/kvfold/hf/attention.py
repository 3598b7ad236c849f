"""The attention and mask functions registered under the name "kvfold".

With a kvfold cache the key tensor carries a handle on its layer, and the layer attends. With any other cache, or
none, both functions do exactly what transformers' "sdpa" does.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvfold.hf import source
from kvfold.hf.band import SOFTMAX, Band, BandLength, band_mask
from kvfold.hf.eager import eager

NAME = source.NAME
HANDLE = "_kvfold_handle"
"""The attribute in which a key tensor carries its layer from `Cache.update` to the attention function."""
OTHER = "_kvfold_not_causal"
"""The attribute of what stands for a mask that is not causal: a layer on pages that gets it can't attend."""
ENTRIES = 1 << 22
"""Entries of a mask that are looked at at once."""


@runtime_checkable
class Handle(Protocol):
    """What a key tensor carries from `Cache.update` to the attention function."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """Attend (B, Hq, Q, D) over the new tokens and what the layer holds."""
        ...


class PagedLength(int):
    """A key length that says: this layer is paged, its mask is the padding mask alone."""


@eager
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers' interface: (B, Q, Hq, Dv) and no weights."""
    handle: Handle | Band | None = getattr(key, HANDLE, None)
    if isinstance(handle, Band):
        return handle.attend(module, query, key, value, attention_mask, scaling, dropout=dropout, **kwargs)
    if handle is None:
        out: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    name = type(module).__name__
    for argument in SOFTMAX:
        if kwargs.get(argument) is not None:
            raise ValueError(f"{name} attends with {argument}, which a kvfold cache does not support")
    if dropout:
        raise ValueError(f"dropout={dropout} in {name}: a kvfold cache is for inference; call model.eval()")
    if attention_mask is not None and getattr(attention_mask, OTHER, False):
        raise ValueError(f"{name} asks for an attention mask that is not causal; a kvfold cache attends causally")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} in {name}: a kvfold cache takes a padding mask, "
            "(B, T)"
        )
    valid = None if attention_mask is None else attention_mask[:, -query.shape[2] :].bool()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return handle.attend(module, query, key, value, valid, scale).transpose(1, 2).contiguous(), None


@eager
def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask function of transformers' interface: the padding mask for paged layers, SDPA's mask elsewhere."""
    if isinstance(kwargs.get("kv_length"), BandLength) and not args:
        return band_mask(kwargs)
    if not isinstance(kwargs.get("kv_length"), PagedLength):
        made: Tensor | None = sdpa_mask(*args, **kwargs)
        return made
    if not _is_causal(kwargs):
        # Models make masks that none of their layers uses: who uses it says so.
        refused = torch.empty(0, dtype=torch.float32)
        setattr(refused, OTHER, True)
        return refused
    padding: Tensor | None = kwargs.get("attention_mask")
    if padding is not None and padding.shape[1] != kwargs["kv_length"]:
        raise ValueError(
            f"attention_mask of shape {tuple(padding.shape)} must cover all tokens read so far and the new ones: "
            f"(B, {int(kwargs['kv_length'])})"
        )
    if padding is None or bool(padding[:, -kwargs["q_length"] :].all()):
        return None
    return padding


def _is_causal(kwargs: dict[str, Any]) -> bool:
    """Whether a mask function says, of the tokens of this pass, what the causal one says.

    So do windows that are not full yet, and blocks of a text without images. It is asked in pieces, up to the first
    that differs.
    """
    function = kwargs.get("mask_function", causal_mask_function)
    if function is causal_mask_function:
        return True
    tokens, columns, start = int(kwargs["q_length"]), int(kwargs["kv_length"]), kwargs.get("q_offset", 0)
    rows = max(1, ENTRIES // (columns * int(kwargs["batch_size"])))
    alike: dict[str, Any] = {
        name: kwargs[name] for name in ("batch_size", "kv_offset", "use_vmap", "device") if name in kwargs
    }
    for first in range(0, tokens, rows):
        place: dict[str, Any] = dict(
            alike, q_length=min(rows, tokens - first), q_offset=start + first, kv_length=columns,
            allow_is_causal_skip=False,
        )  # fmt: skip
        here, causal = (sdpa_mask(mask_function=f, **place) for f in (function, causal_mask_function))
        if not torch.equal(here, causal.expand_as(here)):
            return False
    return True


def register() -> None:
    """Make "kvfold" known to transformers; called when the first cache is made, not on import."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
