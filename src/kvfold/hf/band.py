"""Sliding windows: a query reads the last tokens of its text, its own too, and no T x T mask says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from kvfold import ops


class BandLength(int):
    """A key length that says: these layers read a band, their mask is the padding mask alone."""

    window: int

    def __new__(cls, length: int, window: int) -> "BandLength":
        made = super().__new__(cls, length)
        made.window = window
        return made


def band_mask(kwargs: dict[str, Any]) -> Tensor | None:
    """What stands for a banded layer's mask: none, the padding mask (B, T), or the mask of a model that wants another.

    `kwargs`: what a mask function of transformers' interface is given.
    """
    length, function = kwargs["kv_length"], kwargs.get("mask_function")
    if not alike(function, sliding_window_causal_mask_function(length.window)):
        made: Tensor | None = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
        return made
    padding: Tensor | None = kwargs.get("attention_mask")
    if padding is None or bool(padding[:, kwargs.get("kv_offset", 0) :].all()):
        return None
    return padding


def alike(one: Any, other: Any) -> bool:
    """Whether two functions are of one code over values that are alike, so that they say the same of everything."""
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    codes = [getattr(x, "__code__", None) for x in (one, other)]
    if codes[0] is None or codes[0] is not codes[1]:
        return False
    held = [tuple(cell.cell_contents for cell in x.__closure__ or ()) for x in (one, other)]
    return alike(*held) and alike(one.__defaults__ or (), other.__defaults__ or ())


@dataclass(frozen=True)
class Band:
    """What a sliding-window layer's keys carry to the attention function."""

    window: int

    def is_in(self, k: Tensor, mask: Tensor | None) -> bool:
        """Whether transformers' own attention keeps to the band, over keys (B, H, T, D) and with this mask.

        A mask that is made outside a graph, for layers that are compiled one by one, may be ours, which says nothing of
        the band.
        """
        return k.shape[2] <= self.window if mask is None else mask.dim() == 4

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, scale: float | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(B, Q, Hq, Dv) and no weights, of queries (B, Hq, Q, D) that are those of the last keys (B, H, T, D).

        `padding`: None; (B, W) for the columns read so far; or a model's own mask, (B, 1, Q, T), for all columns up
        to the last key. What the kernel has no words for goes to transformers' "sdpa", with a mask of this band.
        """
        new, held = q.shape[2], k.shape[2]
        if padding is not None and padding.dim() == 4:
            return _sdpa(module, q, k, v, padding[..., -held:], scale, kwargs)
        if padding is not None:
            padding = padding[:, -held:].bool()
            padding = None if bool(padding.all()) else padding
        if padding is None and new == 1:
            return _sdpa(module, q, k, v, None, scale, kwargs)  # what is there is what it sees
        differs = kwargs.get("dropout") or any(kwargs.get(name) is not None for name in SOFTMAX)
        wants = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if new == 1 or differs or wants or (padding is not None and not _in_front(padding)):
            return _sdpa(module, q, k, v, self._mask(new, held, padding, q.device), scale, kwargs)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = q.detach(), k.detach(), v.detach()
        if padding is None:
            out = ops.causal(q, k, v, scale, window=self.window)[0]
        else:
            out = ops.causal_rows(q, k, v, padding, scale, window=self.window)[0]
        return out.transpose(1, 2).contiguous(), None

    def _mask(self, new: int, held: int, padding: Tensor | None, device: torch.device) -> Bool[Tensor, "#B 1 Q T"]:
        """Which keys each query sees."""
        keys = torch.arange(held, device=device)
        asked = keys[held - new :, None]
        seen = ((keys <= asked) & (keys > asked - self.window))[None, None]
        return seen if padding is None else seen & padding[:, None, None]


SOFTMAX = ("softcap", "s_aux", "position_bias")
"""Arguments of attention functions that change the softmax in ways that our kernels don't know."""
Sdpa = Callable[..., tuple[Tensor, Tensor | None]]


def _sdpa(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    attend: Sdpa = sdpa_attention_forward
    return attend(module, q, k, v, mask, scaling=scale, **kwargs)


def _in_front(padding: Bool[Tensor, "B T"]) -> bool:
    """Whether each row's padding stands before its tokens, where columns are as far apart as tokens."""
    return bool((padding == (padding.long().cummax(1).values > 0)).all())
