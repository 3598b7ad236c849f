"""Attention over numbers of eight bits by its definition: bytes become numbers, a block of tokens at a time."""

from typing import Any

import torch
from torch import Tensor

from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.dispatch import register


@register("attend_fp8", "naive", rank=0)
def attend_fp8(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    b, h = q.shape[:2]

    def column(name: str, start: int, stop: int) -> Tensor:
        plane: Tensor = table.dense(name, start, stop)
        return plane.reshape(b, h, *plane.shape[1:])

    def block(start: int, stop: int) -> Block:
        codes = (column(what, start, stop).view(torch.float8_e4m3fn).float() for what in ("keys", "values"))
        return Block(*codes, *(column(name, start, stop) for name in ("key_scale", "value_scale")))

    valid, width = table.valid(), table.pool.planes["values"].shape[-1]
    return attend_blocks(
        q, scale, valid.reshape(b, h, *valid.shape[1:]), width, block, column, mass=mass, read=read, compact=compact,
        position=position, weights=weights,
    )  # fmt: skip
