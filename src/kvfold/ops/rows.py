"""Attention of a few queries over a table's rows by a compiled kernel: at once, or in turn where memory is short."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.attend.naive import merge
from kvfold.ops.cpu import floats, threads


def attend_rows(
    kernel: Callable[..., None], planes: tuple[str, ...] | Callable[[Any], tuple[Any, ...]], q: Tensor, table: Any,
    scale: float, *, dv: int, mass: str | None, read: Tensor | None, weights: bool, here: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What `attend_pages` returns, by a kernel over the `planes` of a pool (their names, or what gives the kernel's
    arguments); values have `dv` numbers.

    Where not all of a table's pages have room in memory at once, stretches of them answer in turn; `here`: all are
    there. A step asks once a layer: NumPy makes its arrays in a tenth of the time of torch.
    """
    if table.pool.memory is not None and not here:

        def answer(part: Any, some: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return attend_rows(kernel, planes, q, part, scale, dv=dv, mass=mass, read=some, weights=weights, here=True)

        return in_turn(answer, table, read, weights=weights)
    (b, h, g, n, d), pool, t = q.shape, table.pool, table.longest
    rows = b * h, g * n
    out = np.empty((b, h, g, n, dv), dtype=np.float32)
    lse = np.empty((b, h, g, n), dtype=np.float32)
    probabilities = np.empty((b, h, g, n, t), dtype=np.float32) if weights else None
    arrays = map(pool.array, planes) if isinstance(planes, tuple) else planes(pool)  # a step asks once a layer
    kernel(
        floats(q).reshape(*rows, d), *arrays, None if mass is None else pool.array(mass),
        None if read is None else read.reshape(b * h, -1).contiguous().numpy(),
        table.table, table.lengths, table.holes, table.hole_count, pool.page_size, scale, threads(),
        out.reshape(*rows, dv), lse.reshape(rows), None if probabilities is None else probabilities.reshape(*rows, t),
    )  # fmt: skip
    found = torch.from_numpy(out)
    return (
        found if q.dtype == torch.float32 else found.to(q.dtype),
        torch.from_numpy(lse),
        None if probabilities is None else torch.from_numpy(probabilities),
    )


def in_turn(
    answer: Callable[[Any, Tensor | None], tuple[Tensor, Tensor, Tensor | None]], table: Any, read: Tensor | None, *,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What `answer` says of one stretch of a table after the other, as its memory brings them, under one softmax."""
    found = [answer(part, some) for part, some in table.pool.memory.in_turn(table, read, shares=weights)]
    return found[0] if len(found) == 1 else _merged(found)


def _merged(found: list[tuple[Tensor, Tensor, Tensor | None]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The answers of stretches that follow each other as one."""
    out, lse = merge([answer[:2] for answer in found])
    shares = [left * torch.exp(own - lse).nan_to_num(0.0)[..., None] for _, own, left in found if left is not None]
    return out, lse, torch.cat(shares, -1) if shares else None
