"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv:2405.04434): a token's latent lies on pages, not its heads.

The cache gets one latent c (R channels) and one turned key r (N channels) a token; `expand_kv` makes keys and values of
all heads of them, linearly: K_h = A_h [c; r], V_h = B_h c. So a query attends over latents, q_h . K_h being (A_h' q_h)
. [c; r], and what it gets of values is B_h times what it gets of c: attention with one KV head, key [c; r], value c.
transformers' cache holds R + N numbers a token; here c is there twice, 2 R + N. A and B are read off `expand_kv` itself
at every pass: no layout of weights is assumed, and nothing is remembered that could change.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.hf.attention import HANDLE, Handle
from kvfold.hf.source import EXPAND
from kvfold.hf.standing import StandIn, stand


def is_latent(module: nn.Module | None) -> bool:
    """Whether an attention module makes its heads of a latent."""
    return callable(getattr(module, EXPAND, None))


@dataclass
class LatentHandle:
    """What expanded keys carry: their layer, and the latents that they were made of."""

    layer: Handle
    latent: Tensor
    """(B, 1, Q, R)"""
    turned: Tensor
    """(B, 1, Q, N)"""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float) -> Tensor:
        """(B, Hq, Q, Dv) over the new tokens and what the layer holds, by their latents."""
        r, group = self.latent.shape[-1], q.shape[1] // k.shape[1]
        keys, values, shift = (x.repeat_interleave(group, 0) for x in self._maps(module))
        asked = torch.einsum("bhqd,hed->bhqe", q, keys)
        stored = torch.cat([self.latent, self.turned], -1)
        got = self.layer.attend(module, asked, stored, self.latent, valid, scale)
        return torch.einsum("bhqr,hrd->bhqd", got, values[:, :r]) + shift

    def _maps(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """What each channel adds to keys (H, R + N, D) and values (H, R + N, Dv), and values of zeros (H, 1, Dv)."""
        r, n = self.latent.shape[-1], self.turned.shape[-1]
        each = torch.eye(r + n + 1, r + n, dtype=self.latent.dtype, device=self.latent.device)[None, None]
        k, v = expand(module, each[..., :r], each[..., r:])
        nothing = slice(r + n, None)  # a constant in all keys changes no softmax
        return (k[0] - k[0, :, nothing])[:, : r + n], (v[0] - v[0, :, nothing])[:, : r + n], v[0, :, nothing]


def expand(module: Any, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads, as the module's class makes them."""
    made: tuple[Tensor, Tensor] = getattr(type(module), EXPAND)(module, latent, turned)
    return made


class Expanding(StandIn):
    """`expand_kv` of one module, whose keys carry the handle that its latents carried."""

    name = EXPAND

    def __call__(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = expand(self.module, latent, turned)
        layer = getattr(latent, HANDLE, None)
        if layer is not None:
            setattr(keys, HANDLE, LatentHandle(layer, latent, turned))
        return keys, values


def watch_latent(module: nn.Module) -> None:
    """Let the keys that a module makes of latents know their layer; without a kvfold cache nothing changes."""
    stand(Expanding, module)
