"""Operations on pages with Triton kernels on CUDA, where they fit; the definition for the rest.

Lengths live on the device too, where the kernel that appends moves them on: with `full` and methods that act on prompts
alone a step waits for nothing. Methods that drop tokens while decoding do, and close their gaps as the definition does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.dispatch import register
from kvfold.ops.gpu import answers, attend_rows, fits
from kvfold.ops.paged import naive
from kvfold.ops.rows import in_turn


@register("attend_pages", "triton", rank=20, fits=fits)
def attend_pages(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    if table.pool.memory is not None and compact is None:

        def answer(part: Any, some: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            return attend_pages(
                q, part, scale, mass=mass, read=some, compact=None, position=position, weights=weights
            )  # fmt: skip

        return in_turn(answer, table, read, weights=weights)
    planes = table.pool.planes
    dv = planes["values"].shape[-1]
    if compact is not None or not answers(q, table, mass, q.shape[4], dv):
        return naive.attend_pages(
            q, table, scale, mass=mass, read=read, compact=compact, position=position, weights=weights
        )
    from kvfold.ops.paged import triton_kernels

    return attend_rows(
        triton_kernels.attend, q, table, scale, dv=dv, mass=mass, read=read, weights=weights, keys=planes["keys"],
        values=planes["values"],
    )  # fmt: skip


@register("step_pages", "triton", rank=20, fits=fits)
def step_pages(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], scale: float, *, mass: str | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from kvfold.ops.paged import triton_kernels

    if table.pool.memory is not None:
        return naive.step_pages(q, table, planes, scale, mass=mass, weights=weights)
    pages, lengths, *_ = table.step()
    new = {name: plane[:, 0].to(table.pool.planes[name].dtype) for name, plane in planes.items()}
    fills = {name: spec.fill for name, spec in table.pool.specs.items()}
    triton_kernels.append(table.pool.planes, new, pages, lengths, fills=fills)
    return attend_pages(
        q, table, scale, mass=mass, read=None, compact=None, position="position", weights=weights
    )  # fmt: skip


@register("keep_pages", "triton", rank=20, fits=fits)
def keep_pages(table: Any, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool) -> None:
    """After a prompt what stays moves to a pool of its own, at the cost of what stays; one wait, for the counts."""
    counts = mask.sum(1).cpu().numpy().astype(np.int32)
    in_place = table.pool.arena is not None  # which may have no room for both
    if slack or in_place or table.pool.memory is not None or not counts.any() or bool((counts == table.lengths).all()):
        naive.keep_pages(table, mask, columns, slack=slack)
        return
    from kvfold.ops.paged import triton_kernels

    slots = torch.argsort((~mask).byte(), dim=1, stable=True)[:, : int(counts.max())]  # the kept ones first
    pool, ids, regular = table.room_for(-(-counts // table.pool.page_size))
    device = mask.device
    left, pages = (torch.from_numpy(x).to(device) for x in (counts, ids))
    chosen = slots.to(torch.int32).contiguous()
    triton_kernels.gather(table.pool.planes, table.on_device()[0], chosen, left, pool.planes, pages)
    table.move_to(pool, ids, regular=regular)
    table.lengths = counts
    table.fill_holes()
    table.put({name: column.gather(1, slots) for name, column in columns.items()}, 0, counts)
