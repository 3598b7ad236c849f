"""Attention over tokens in codes by its definition: codes become numbers, a block of tokens at a time."""

from typing import Any

import torch
from torch import Tensor

from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.codes.naive import decoded_values
from kvfold.ops.codes.packing import unpack
from kvfold.ops.dispatch import register
from kvfold.ops.tokens.coding import Coding

KINDS = {"keys": "key", "values": "value"}


@register("attend_tokens", "naive", rank=0)
def attend_tokens(
    q: Tensor, table: Any, scale: float, *, keys: Coding, values: Coding,
    mass: str | None, read: Tensor | None, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    b, h = q.shape[:2]

    def rows(plane: Tensor) -> Tensor:
        return plane.reshape(b, h, *plane.shape[1:])

    def block(start: int, stop: int) -> Block:
        return Block(
            rows(numbers(table, "keys", keys, start, stop)), rows(numbers(table, "values", values, start, stop))
        )

    def column(name: str, start: int, stop: int) -> Tensor:
        return rows(table.dense(name, start, stop))

    return attend_blocks(
        q, scale, rows(table.valid()), values.size, block, column, mass=mass, read=read, weights=weights
    )


def numbers(table: Any, what: str, coding: Coding, start: int = 0, stop: int | None = None) -> Tensor:
    """What the codes of "keys" or "values" stand for from slot `start` to `stop` of each row, (R, T, D), float32."""
    names = [what, f"{KINDS[what]}_scale", *([] if coding.levels else [f"{KINDS[what]}_zero"])]
    return decoded(coding, *(table.dense(name, start, stop) for name in names))


def decoded(coding: Coding, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """What codes (..., W) stand for, (..., D), with scales and zeros (..., C), float32."""
    if coding.levels is None:
        assert zero is not None
        return decoded_values(codes, scale, zero, coding.size, coding.bits)
    levels = torch.tensor(coding.levels, dtype=torch.float32, device=codes.device)
    return levels[unpack(codes, coding.size, coding.bits).int()] * scale.float()
