"""Attention over pages of kept numbers by its definition: vectors with zeros in them, a block of tokens at a time."""

from typing import Any

from torch import Tensor

from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.dispatch import register
from kvfold.ops.sparse.packing import unpack


@register("attend_sparse", "naive", rank=0)
def attend_sparse(
    q: Tensor, table: Any, scale: float, *, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    b, h = q.shape[:2]

    def rows(plane: Tensor) -> Tensor:
        return plane.reshape(b, h, *plane.shape[1:])

    def column(name: str, start: int, stop: int) -> Tensor:
        return rows(table.dense(name, start, stop))

    def block(start: int, stop: int) -> Block:
        keys = unpack(column("keys", start, stop), column("key_map", start, stop), q.shape[-1])
        values = unpack(column("values", start, stop), column("value_map", start, stop), value_size)
        return Block(keys, values)

    return attend_blocks(
        q, scale, rows(table.valid()), value_size, block, column, mass=mass, read=read, compact=compact,
        position=position, weights=weights,
    )  # fmt: skip
