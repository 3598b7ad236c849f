"""The largest numbers of a vector, and a bitmap of where they stand (Mustafar, arXiv:2505.22913).

Channel c is bit c % 8 of byte c // 8. (The authors' order is another one: tiles of 64 numbers, of keys along the
tokens, and the first number of a tile at the highest bit.)
"""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from kvfold.ops.choose import top_mask


def kept_of(size: int, sparsity: float) -> int:
    """How many of `size` numbers stay: those not below the k-th smallest magnitude, k = int(sparsity * size), at least
    1; so one more than what the sparsity says.
    """
    return size - max(1, int(sparsity * size)) + 1


def map_bytes(size: int) -> int:
    """Bytes of the bitmap of a vector of `size` numbers."""
    return -(-size // 8)


def largest(x: Float[Tensor, "... D"], count: int) -> Bool[Tensor, "... D"]:
    """The `count` numbers of the largest magnitude of each vector; ties go to the earlier channel.

    What is not finite is larger than all that is, so that it is seen.
    """
    size = x.detach().float().abs().nan_to_num(torch.inf, posinf=torch.inf).view(1, -1, x.shape[-1])
    counts = torch.full(size.shape[:2], count, dtype=torch.int64, device=x.device)
    return top_mask(size, counts).view(x.shape)


def pack(x: Float[Tensor, "... D"], count: int) -> tuple[Float[Tensor, "... K"], UInt8[Tensor, "... W"]]:
    """The `count` largest numbers of each vector in the order of their channels, and the bitmap of those."""
    mask = largest(x, count)
    bits = pad(mask, (0, -x.shape[-1] % 8)).view(*x.shape[:-1], map_bytes(x.shape[-1]), 8)
    places = torch.arange(8, device=x.device, dtype=torch.uint8)
    return x[mask].view(*x.shape[:-1], count), (bits.to(torch.uint8) << places).sum(-1, dtype=torch.uint8)


def marked(maps: UInt8[Tensor, "... W"], size: int) -> Bool[Tensor, "... D"]:
    """The channels that bitmaps of vectors of `size` numbers mark."""
    places = torch.arange(8, device=maps.device, dtype=torch.uint8)
    return ((maps[..., None] >> places) & 1).flatten(-2)[..., :size].bool()


def unpack(kept: Float[Tensor, "... K"], maps: UInt8[Tensor, "... W"], size: int) -> Float[Tensor, "... D"]:
    """Vectors of `size` numbers: those that are kept, and zeros."""
    mask = marked(maps, size)
    places = (mask.cumsum(-1) - 1).clamp(min=0, max=kept.shape[-1] - 1)
    return kept.gather(-1, places).masked_fill(~mask, 0.0)
