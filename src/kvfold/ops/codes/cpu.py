"""Attention over pages of codes with the compiled kernel, where it fits; the definition for the rest."""

from typing import Any

import torch
from torch import Tensor

from kvfold.ops.codes import naive
from kvfold.ops.cpu import fits, floats, threads, widths_fit
from kvfold.ops.dispatch import register

ROWS = 64
"""Queries of a row (heads of its group times queries) up to which the kernel reads faster than a dense product."""


@register("attend_codes", "cpu", rank=10, fits=fits)
def attend_codes(
    q: Tensor, table: Any, scale: float, *, bits: int, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    (b, h, g, n, d), t, pool = q.shape, table.longest, table.pool
    if compact is not None or not t or not _readable(pool, g * n, d, value_size, mass):
        return naive.attend_codes(
            q, table, scale, bits=bits, value_size=value_size, mass=mass, read=read, compact=compact,
            position=position, weights=weights,
        )  # fmt: skip
    from kvfold.ops import _cpu

    rows, queries = b * h, g * n
    out, lse = _empty(rows, queries, value_size), _empty(rows, queries)
    shares = _empty(rows, queries, t) if weights else None
    _cpu.attend_codes(
        floats(q.reshape(rows, queries, d)), bits, pool.array("keys"), pool.array("key_scale"), pool.array("key_zero"),
        pool.array("values"), pool.array("value_scale"), pool.array("value_zero"),
        None if mass is None else pool.array(mass),
        None if read is None else read.reshape(rows, -1).contiguous().numpy(),
        table.table, table.lengths, table.holes, table.hole_count, pool.page_size, scale, threads(),
        out.numpy(), lse.numpy(), None if shares is None else shares.numpy(),
    )  # fmt: skip
    left = None if shares is None else shares.view(b, h, g, n, t)
    return out.to(q.dtype).view(b, h, g, n, value_size), lse.view(b, h, g, n), left


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _readable(pool: Any, queries: int, d: int, dv: int, mass: str | None) -> bool:
    """Whether the kernel can answer so many queries of a row over the pages of this pool."""
    scales = [pool.planes[name] for name in ("key_scale", "key_zero", "value_scale", "value_zero")]
    masses = mass is None or pool.planes[mass].dtype == torch.float32
    channels = dv // scales[2].shape[-1]
    sizes = 0 < queries <= ROWS and d > 0 and pool.page_size % 4 == 0 and widths_fit(d, dv, channels)
    return masses and sizes and all(fits(x) and x.dtype == scales[0].dtype for x in scales)
