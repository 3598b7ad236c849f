"""Attention over 8-bit floats by its definition: torch widens them, a block of tokens at a time."""

from typing import Any

import torch
from torch import Tensor

from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.dispatch import register


@register("attend_float8", "naive", rank=0)
def attend_float8(
    q: Tensor, table: Any, scale: float, *, kind: torch.dtype,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    b, h = q.shape[:2]

    def column(name: str, start: int, stop: int) -> Tensor:
        plane: Tensor = table.dense(name, start, stop)
        return plane.reshape(b, h, *plane.shape[1:])

    def block(start: int, stop: int) -> Block:
        keys, values = (column(name, start, stop).view(kind).float() for name in ("keys", "values"))
        return Block(keys, values, column("key_scale", start, stop), column("value_scale", start, stop))

    valid, size = table.valid(), table.pool.specs["values"].width
    return attend_blocks(
        q, scale, valid.view(b, h, valid.shape[-1]), size, block, column, mass=mass, read=read, compact=compact,
        position=position, weights=weights,
    )  # fmt: skip
