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

from kvfold.hf import source, traced
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


PAGED = False
"""An offset of keys that says: this layer is on pages, its mask is the padding mask alone. As a number it is 0."""


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
    if torch.compiler.is_compiling():
        mark = getattr(key, traced.MARK, None)
        if mark is not None and not dropout and all(kwargs.get(argument) is None for argument in SOFTMAX):
            setattr(key, traced.MARK, None)  # whoever attends with these keys again is heard, outside
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return traced.attend(query, key, value, attention_mask, mark, scale), None
        if isinstance(handle, Band) and handle.is_in(key, attention_mask):
            setattr(key, HANDLE, None)
            handle = None
        if mark is not None or handle is not None:
            outside: tuple[Tensor, Tensor | None] = _outside(
                module, query, key, value, attention_mask, scaling, dropout, **kwargs
            )
            return outside
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(handle, module, query, key, value, attention_mask, scale), None


_outside = torch.compiler.disable(attention)  # type: ignore[no-untyped-call]


def attend(
    handle: Handle, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scale: float
) -> Tensor:
    """(B, Q, Hq, Dv) of the layer whose keys these are. ValueError where the mask is more than one of padding."""
    valid = None if attention_mask is None else _padding(attention_mask, q.shape[2], module)
    return handle.attend(module, q, k, v, valid, scale).transpose(1, 2).contiguous()


def _padding(attention_mask: Tensor, tokens: int, module: nn.Module) -> Tensor:
    """Which of the new tokens are not padding, (B, Q)."""
    name = type(module).__name__
    if getattr(attention_mask, OTHER, False):
        raise ValueError(f"{name} asks for an attention mask that is not causal; a kvfold cache attends causally")
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} in {name}: a kvfold cache takes a padding mask, "
            "(B, T)"
        )
    return attention_mask[:, -tokens:].bool()


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """A mask function of transformers' interface: the padding mask for paged layers, SDPA's mask elsewhere."""
    if isinstance(kwargs.get("kv_length"), BandLength) and not args:
        return band_mask(kwargs)
    if kwargs.get("kv_offset") is not PAGED:
        made: Tensor | None = sdpa_mask(*args, **kwargs)
        return made
    padding: Tensor | None = kwargs.get("attention_mask")
    known = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    fits = padding is None or padding.shape[1] == kwargs["kv_length"]
    if torch.compiler.is_compiling() and known and fits:
        return padding  # whether it hides anything is seen when the graph runs
    return _mask(**kwargs)


@eager
def _mask(**kwargs: Any) -> Tensor | None:
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
