"""Operations on pages by their definition: read rows as dense tensors, work on those, write back."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.ops.attend import attend
from kvfold.ops.dispatch import register, select


@register("attend_pages", "naive", rank=0)
def attend_pages(
    q: Tensor, table: Any, scale: float, *,
    mass: str | None, read: Tensor | None, compact: Any, position: str, weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    (b, h, g, n, d) = q.shape

    def rows(plane: Tensor) -> Tensor:
        return plane.reshape(b, h, *plane.shape[1:])

    keys, values = rows(table.dense("keys")).to(q.dtype), rows(table.dense("values"))
    if compact is not None:
        keys = compact.rotate_keys(keys, rows(table.dense(position)), rows(table.valid().cumsum(1) - 1))
    bias = None if mass is None else rows(table.dense(mass))
    if read is not None or not table.even or table.holed:  # -inf for a slot that is empty or not read
        seen = rows(table.valid())
        seen = seen if read is None else seen & read
        bias = torch.where(
            seen, torch.zeros((), device=seen.device, dtype=torch.float32) if bias is None else bias, -torch.inf
        )
    # The heads of a group, and all their queries, read the same keys: one block of G * Q queries per KV head.
    block = q.reshape(b, h, g * n, d)
    bias = None if bias is None else bias[:, :, None]
    out, lse = attend(block, keys, values.to(q.dtype), scale, bias)
    shaped = out.view(b, h, g, n, values.shape[-1]), lse.view(b, h, g, n)
    if not weights:
        return *shaped, None
    logits = torch.einsum("bhqd,bhtd->bhqt", block.float(), keys.float()) * scale
    probabilities = torch.exp((logits if bias is None else logits + bias) - lse[..., None]).nan_to_num(0.0)
    return *shaped, probabilities.view(b, h, g, n, -1)


@register("step_pages", "naive", rank=0)
def step_pages(
    q: Tensor, table: Any, planes: Mapping[str, Tensor], scale: float, *, mass: str | None, weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    select("append_pages", planes["keys"])(table, planes, None)
    out: tuple[Tensor, Tensor, Tensor | None] = select("attend_pages", q)(
        q, table, scale, mass=mass, read=None, compact=None, position="position", weights=weights
    )
    return out


@register("append_pages", "naive", rank=0)
def append_pages(table: Any, planes: Mapping[str, Tensor], valid: Tensor | None) -> None:
    count = planes["keys"].shape[1]
    if table.pool.memory is not None:
        _append_elsewhere(table, planes, valid)
        return
    place = table.tail(count) if valid is None else None
    if place is not None:
        for name, spec in table.pool.specs.items():
            block = table.block(name)[:, place]
            block.copy_(planes[name]) if name in planes else block.fill_(spec.fill)
        return
    counts = np.full(table.rows, count) if valid is None else valid.sum(1).cpu().numpy()
    pages, offsets = table.slots(counts)
    for name, plane in table.pool.planes.items():
        if name not in planes:
            plane[pages, offsets] = table.pool.specs[name].fill
            continue
        new = planes[name].flatten(0, 1) if valid is None else planes[name][valid]
        plane[pages, offsets] = new.to(plane.dtype)


def _append_elsewhere(table: Any, planes: Mapping[str, Tensor], valid: Tensor | None) -> None:
    """`append_pages` where pages are elsewhere: their memory takes the tokens of even rows, or says which to write."""
    count = planes["keys"].shape[1]
    if valid is not None:
        table.add(valid.sum(1).cpu().numpy(), {name: new[valid] for name, new in planes.items()})
        return
    start = table.extend(count)
    for first, last in table.pool.memory.appended(table, start, count, planes):
        rows = np.repeat(np.arange(table.rows), last - first)
        slots = (start[:, None] + np.arange(first, last)).reshape(-1)
        new = {name: plane[:, first:last].flatten(0, 1) for name, plane in planes.items()}
        for name, spec in table.pool.specs.items():
            wide = () if spec.width is None else (spec.width,)
            new.setdefault(name, torch.full((len(rows), *wide), spec.fill, dtype=spec.dtype))
        table.write(rows, slots, new)


@register("keep_pages", "naive", rank=0)
def keep_pages(table: Any, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool) -> None:
    slots = torch.arange(mask.shape[1], device=mask.device)
    gaps = torch.where(mask, mask.shape[1], slots).amin(1) if mask.shape[1] else mask.sum(1)
    counts, gaps = torch.stack([mask.sum(1), gaps]).cpu().numpy().astype(np.int32)  # one wait for the device
    before, shared = table.lengths, table.shared
    dropping = counts < before
    if shared:  # what others hold is copied only if something changes
        columns = {name: x for name, x in columns.items() if not _same(x[mask], table.dense(name)[mask])}
    if not dropping.any() and not (shared and columns):
        table.put(columns, 0, counts)
        return
    first = 0 if shared else int(gaps[dropping].min())  # the first slot that any row drops: nothing before it moves
    longest = int(counts.max())
    order = torch.argsort((~mask[:, first:]).byte(), dim=1, stable=True)[:, : longest - first]  # the kept ones first
    kept = {}
    for name in table.pool.planes:
        dense = columns[name][:, first:] if name in columns else table.dense(name, first)
        wide = order.view(*order.shape, *[1] * (dense.dim() - 2)).expand(-1, -1, *dense.shape[2:])
        kept[name] = dense.gather(1, wide)
    if shared:
        pool, pages, regular = table.room_for(-(-counts // table.pool.page_size))
        table.move_to(pool, pages, regular=regular)
        table.lengths = counts.copy()  # not a view that holds the gaps too
        table.fill_holes()
        table.put(kept, 0, counts)
        return
    table.put({name: x[:, :first] for name, x in columns.items()}, 0, np.minimum(counts, first))
    table.put(kept, first, counts)
    shorten(table, counts.copy())


def shorten(table: Any, counts: np.ndarray) -> None:
    """The tokens of each row have moved to its front: so many are left. Memory goes back where it is worth moving for.

    One token out for one in happens at every decode step: only a page's worth per row is.
    """
    size = table.pool.page_size
    dropped, free = int((table.counts - counts).sum()), int((table.table >= 0).sum() - (-(-counts // size)).sum())
    table.lengths = counts
    table.fill_holes()
    table.trim(slack=dropped < table.rows * size and (table.regular or free < 2 * table.rows))


def _same(new: Tensor, old: Tensor) -> bool:
    return torch.equal(new.to(old.dtype), old)
