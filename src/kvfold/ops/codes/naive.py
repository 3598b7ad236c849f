"""Attention over pages of codes by its definition: codes become numbers, a block of pages at a time."""

from typing import Any

from torch import Tensor

from kvfold.ops.attend.blocked import Block, attend_blocks
from kvfold.ops.codes.packing import unpack
from kvfold.ops.dispatch import register


@register("attend_codes", "naive", rank=0)
def attend_codes(
    q: Tensor, table: Any, scale: float, *, bits: int, value_size: int,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    (b, h), size = q.shape[:2], table.pool.page_size

    def rows(plane: Tensor) -> Tensor:
        return plane.reshape(b, h, *plane.shape[1:])

    def block(start: int, stop: int) -> Block:
        pages = start // size, -(-stop // size)
        keys = key_pages(table, *pages, bits).flatten(1, 2)
        values = value_pages(table, *pages, value_size, bits).flatten(1, 2)
        return Block(*(rows(x[:, : stop - start]) for x in (keys, values)))

    def column(name: str, start: int, stop: int) -> Tensor:
        return rows(table.dense(name, start, stop))

    return attend_blocks(
        q, scale, rows(table.valid()), value_size, block, column, mass=mass, read=read, compact=compact,
        position=position, multiple=size, weights=weights,
    )  # fmt: skip


def key_pages(table: Any, first: int, last: int, bits: int) -> Tensor:
    """Keys of the pages from `first` to `last` of each row, (R, M, P, D), float32."""
    codes, scale, zero = (table.paged(name, first, last) for name in ("keys", "key_scale", "key_zero"))
    return decoded_keys(codes, scale, zero, bits)


def value_pages(table: Any, first: int, last: int, size: int, bits: int) -> Tensor:
    """Values of the pages from `first` to `last` of each row, (R, M, P, Dv), float32."""
    codes, scale, zero = (table.paged(name, first, last) for name in ("values", "value_scale", "value_zero"))
    return decoded_values(codes, scale, zero, size, bits)


def decoded_keys(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Codes (..., P, W) of keys, and what channels of their page share, (..., D)."""
    return unpack(codes, scale.shape[-1], bits).mul_(scale[..., None, :]).add_(zero[..., None, :])


def decoded_values(codes: Tensor, scale: Tensor, zero: Tensor, size: int, bits: int) -> Tensor:
    """Codes (..., W) of values of `size` numbers, and what runs of their channels share, (..., C)."""
    wide = unpack(codes, size, bits)
    groups = wide.view(*scale.shape, size // scale.shape[-1])
    groups.mul_(scale[..., None]).add_(zero[..., None])
    return wide
