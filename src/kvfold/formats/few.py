"""A query that reads some stretches of a segment's tokens alone, as pages or by a mask; one that says which."""

from collections.abc import Sequence
from copy import copy
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats.index import Giving, Handed
from kvfold.formats.paged import PagedSegment
from kvfold.formats.parts import Answer, merged
from kvfold.formats.segment import Segment
from kvfold.formats.tailed import TailedSegment
from kvfold.pages import FewPages, PageTable
from kvfold.rotation import Compact, Rope

Chosen = Bool[np.ndarray, "B H S N"]
"""Which units of a (row, head)'s tokens, counted through them in order, each of S lists has; S divides its group."""


def attend_few(
    segment: Segment, q: Float[Tensor, "B H G 1 D"], scale: float, chosen: Chosen, unit: int, *, weights: bool = False,
    slots: Rope | None = None, seen: Int[np.ndarray, " B"] | None = None,
) -> Answer:  # fmt: skip
    """(out, lse, what each slot got) over the tokens of the units that are chosen, `unit` tokens each.

    Where units are whole pages of what holds them, those pages are all that is read, and what it costs is theirs;
    elsewhere the segment is told which slots to read. `slots`: what is read attends at positions 0, 1, 2, ... in its
    order, and the query, which stands at text position `seen[b]` - 1, at the last of them.
    """
    if slots is None and not weights:
        parts = segment.parts if isinstance(segment, TailedSegment) else (segment,)
        pages = _pages(parts, chosen, unit)
        if pages is not None:
            return merged([_listed(part, q, scale, some) for part, some in pages], weights=False)
    return _masked(segment, q, scale, chosen, unit, weights, slots, seen)


def attend_and_give(
    segment: Segment, selection: Giving, q: Float[Tensor, "B H G 1 D"], scale: float, seen: Int[np.ndarray, " B"],
    handed: Handed, *, weights: bool,
) -> Answer:  # fmt: skip
    """(out, lse, what each slot got) over everything; by what that got `selection` hands on what later layers read."""
    counts = segment.counts()
    looks = selection.looks(counts, seen)
    out, lse, left = segment.attend(q, scale, weights=weights or looks)
    if looks:
        valid, _ = segment.columns()
        got = left
        if got is None:  # not every format leaves it
            keys = segment.dense().keys
            got = torch.exp(q.float() @ keys.float().mT[:, :, None] * scale - lse[..., None])
        unit = ((valid.cumsum(-1) - 1) // selection.unit).masked_fill(~valid, -1)
        selection.give(got[:, :, :, 0].float(), unit, counts, seen, handed)
    return out, lse, left if weights else None


def read_slots(valid: Bool[Tensor, "B H T"], chosen: Chosen, unit: int) -> Bool[Tensor, "B H S T"]:
    """The slots that each list has, of those that are `valid`."""
    number = ((valid.cumsum(-1) - 1).clamp(min=0) // unit).clamp(max=chosen.shape[-1] - 1)
    units = torch.from_numpy(chosen).to(valid.device)
    slots = units.gather(-1, number[:, :, None].expand(*units.shape[:3], -1))
    return slots & valid[:, :, None]


def _pages(
    parts: Sequence[object], chosen: Chosen, unit: int
) -> list[tuple[PagedSegment, Bool[np.ndarray, "B H S M"]]] | None:
    """Each part that holds tokens, and which of its pages those units are; None where they are no whole pages."""
    found: list[tuple[PagedSegment, np.ndarray]] = []
    start: Int[np.ndarray, "B H"] = np.zeros(chosen.shape[:2], dtype=np.int64)
    for part in parts:
        if not isinstance(part, PagedSegment) or not part.listed or part.table.holed:
            return None
        size, counts = part.pool.page_size, part.counts()
        if unit % size or (start % size).any():
            return None
        if part.longest:
            place = start[..., None] + np.arange(part.table.table.shape[1]) * size
            number = np.minimum(place // unit, chosen.shape[-1] - 1)
            some = np.take_along_axis(
                chosen, np.broadcast_to(number[:, :, None], (*chosen.shape[:3], number.shape[-1])), -1
            )
            found.append((part, some))
        start = start + counts
    return found


def _listed(part: PagedSegment, q: Tensor, scale: float, pages: Bool[np.ndarray, "B H S M"]) -> Answer:
    (b, h, g, n, d), lists = q.shape, pages.shape[2]
    few = copy(part)
    few.table = cast(PageTable, FewPages(part.table, pages.reshape(b * h, lists, -1)))  # as far as reading goes
    few.heads = h * lists
    out, lse, _ = few.attend(q.reshape(b, h * lists, g // lists, n, d), scale)
    return out.reshape(b, h, g, n, -1), lse.reshape(b, h, g, n), None


def _masked(
    segment: Segment, q: Tensor, scale: float, chosen: Chosen, unit: int, weights: bool, rope: Rope | None,
    seen: np.ndarray | None,
) -> Answer:  # fmt: skip
    valid, _ = segment.columns()
    slots, lists, found = read_slots(valid, chosen, unit), chosen.shape[2], list[Answer]()
    for read, asked in zip(slots.unbind(2), q.chunk(lists, 2), strict=True):
        compact, asks = None, asked
        if rope is not None and seen is not None:
            compact = Compact(rope, read.cumsum(-1) - 1)
            place = torch.from_numpy(seen - 1).to(read.device)[:, None]
            asks = compact.rotate_queries(asked, place, read.sum(-1) - 1)
        found.append(segment.attend(asks, scale, read=read, compact=compact, weights=weights))
    if lists == 1:
        return found[0]
    outs, norms, lefts = zip(*found, strict=True)
    known = None if any(left is None for left in lefts) else torch.cat(lefts, 2)
    return torch.cat(outs, 2), torch.cat(norms, 2), known
