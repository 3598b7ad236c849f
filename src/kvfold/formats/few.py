"""A query that reads some stretches of a segment's tokens alone: as pages where they are that, else as a mask."""

from collections.abc import Sequence
from copy import copy
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats.chosen import Chosen
from kvfold.formats.paged import PagedSegment
from kvfold.formats.parts import Answer, merged
from kvfold.formats.segment import Segment
from kvfold.formats.tailed import TailedSegment
from kvfold.pages import FewPages, PageTable


def attend_few(
    segment: Segment, q: Float[Tensor, "B H G 1 D"], scale: float, chosen: Chosen, unit: int, *, weights: bool = False
) -> Answer:
    """(out, lse, what each slot got) over the tokens of the units that are chosen, `unit` tokens each.

    Where units are whole pages of what holds them, those pages are all that is read, and what it costs is theirs;
    elsewhere the segment is told which slots to read.
    """
    if not weights:
        parts = segment.parts if isinstance(segment, TailedSegment) else (segment,)
        pages = _pages(parts, chosen, unit)
        if pages is not None:
            return merged([_listed(part, q, scale, some) for part, some in pages], weights=False)
    return _masked(segment, q, scale, chosen, unit, weights)


def _pages(
    parts: Sequence[object], chosen: Chosen, unit: int
) -> list[tuple[PagedSegment, Int[np.ndarray, "B H S M"]]] | None:
    """Each part that holds tokens, and the places of those units' pages in it; None where they are no whole pages."""
    found: list[tuple[PagedSegment, np.ndarray]] = []
    start: Int[np.ndarray, "B H"] = np.zeros(chosen.counts.shape[:2], dtype=np.int64)
    for part in parts:
        if not isinstance(part, PagedSegment) or not part.listed or part.table.holed:
            return None
        size, counts = part.pool.page_size, part.counts()
        if unit % size or (start % size).any():
            return None
        if part.longest:
            found.append((part, _places(chosen, unit // size, start // size)))
        start = start + counts
    return found


def _places(chosen: Chosen, pages: int, before: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H S M"]:
    """The places of units of so many pages behind `before` others; negative where there is none."""
    if pages == 1 and not before.any():
        return chosen.numbers
    first = np.where(chosen.numbers < 0, -1 - before.max(initial=0), chosen.numbers) * pages - before[..., None, None]
    return (first[..., None] + np.arange(pages)).reshape(*first.shape[:3], -1)


def _listed(part: PagedSegment, q: Tensor, scale: float, places: Int[np.ndarray, "B H S M"]) -> Answer:
    (b, h, g, n, d), lists = q.shape, places.shape[2]
    few = copy(part)
    few.table = cast(PageTable, FewPages(part.table, places.reshape(b * h, lists, -1)))  # as far as reading goes
    few.heads = h * lists
    out, lse, _ = few.attend(q.reshape(b, h * lists, g // lists, n, d), scale)
    return out.reshape(b, h, g, n, -1), lse.reshape(b, h, g, n), None


def _masked(segment: Segment, q: Tensor, scale: float, chosen: Chosen, unit: int, weights: bool) -> Answer:
    valid, _ = segment.columns()
    number = ((valid.cumsum(-1) - 1).clamp(min=0) // unit).clamp(max=chosen.total - 1)
    units, lists = torch.from_numpy(chosen.mask).to(valid.device), chosen.counts.shape[2]
    found = []
    for some, asked in zip(units.unbind(2), q.chunk(lists, 2), strict=True):
        found.append(segment.attend(asked, scale, read=valid & some.gather(-1, number), weights=weights))
    if lists == 1:
        return found[0]
    outs, norms, lefts = zip(*found, strict=True)
    known = None if any(left is None for left in lefts) else torch.cat(lefts, 2)
    return torch.cat(outs, 2), torch.cat(norms, 2), known
