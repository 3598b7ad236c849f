"""What the Triton kernels on CUDA share: whether they fit, and how they are asked over a page table."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvfold.ops.cpu import FLOATS

WIDEST = 256
"""The largest head size whose tiles fit."""
ROWS = 64
"""Queries of a row (heads of its group times queries) up to which the kernels answer."""


def fits(x: Tensor) -> bool:
    """Whether the kernels can take it: on CUDA, with Triton installed, no gradient wanted."""
    return x.device.type == "cuda" and x.dtype in FLOATS and not x.requires_grad and find_spec("triton") is not None


def answers(q: Tensor, table: Any, mass: str | None, *widths: int) -> bool:
    """Whether a kernel can answer queries (B, H, G, Q, D) over a table's pages of vectors of so many numbers."""
    masses = mass is None or table.pool.specs[mass].dtype == torch.float32
    return masses and 0 < q.shape[2] * q.shape[3] <= ROWS and 0 < max(widths) <= WIDEST and table.longest > 0


def attend_rows(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor | None]], q: Tensor, table: Any, scale: float, *, dv: int,
    mass: str | None, read: Tensor | None, weights: bool, **planes: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What `attend_pages` returns, by a kernel over `planes` of a table's pages; values have `dv` numbers."""
    from kvfold.ops.triton_rows import left_out

    (b, h, g, n, d), t = q.shape, table.longest
    pages, lengths, holes, hole_count = table.on_device()
    holed = (holes, hole_count) if table.holed else (None, None)
    capacity = pages.shape[1] * table.pool.page_size
    dropped = left_out(capacity, holed[0], holed[1], None if read is None else read.reshape(b * h, -1))
    out, lse, left = kernel(
        q.reshape(b * h, g * n, d), **planes, table=pages, lengths=lengths, scale=scale,
        mass=None if mass is None else table.pool.planes[mass], dropped=dropped, probabilities=weights,
    )  # fmt: skip
    left = None if left is None else left[..., :t].reshape(b, h, g, n, t)
    return out.view(b, h, g, n, dv), lse.view(b, h, g, n), left
