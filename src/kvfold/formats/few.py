"""A query that reads some stretches of a segment's tokens alone: as pages where they are that, else as a mask."""

from collections.abc import Sequence
from copy import copy
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats.chosen import Chosen
from kvfold.formats.paged import PagedSegment
from kvfold.formats.parts import Answer, merged
from kvfold.formats.segment import Segment
from kvfold.formats.tailed import TailedSegment
from kvfold.pages import FewPages, FewSlots, PageTable


def attend_few(
    segment: Segment, q: Float[Tensor, "B H G 1 D"], scale: float, chosen: Chosen, unit: int, *, weights: bool = False
) -> Answer:
    """(out, lse, what each slot got) over the tokens of the units that are chosen, `unit` tokens each.

    Where units are whole pages of what holds them those pages are all that is read, else their tokens are, where the
    format reads tokens one by one: it costs what is read. Elsewhere the segment is told which slots to read.
    """
    if not weights:
        parts = segment.parts if isinstance(segment, TailedSegment) else (segment,)
        pages = _pages(parts, chosen, unit)
        if pages is not None:
            return merged([_listed(part, q, scale, some) for part, some in pages], weights=False)
    return _masked(segment, q, scale, chosen, unit, weights)


def _pages(parts: Sequence[object], chosen: Chosen, unit: int) -> list[tuple[PagedSegment, FewPages]] | None:
    """Each part that holds tokens, and the pages of those units in it, or their slots; None where it reads neither."""
    found: list[tuple[PagedSegment, FewPages]] = []
    start: Int[np.ndarray, "B H"] = np.zeros(chosen.counts.shape[:2], dtype=np.int64)
    for part in parts:
        if not isinstance(part, PagedSegment) or not part.listed or part.table.holed:
            return None
        size, counts = part.pool.page_size, part.counts()
        whole = not (unit % size or (start % size).any())
        if not whole and not (part.singled and part.pool.device.type == "cpu"):
            return None
        if part.longest:
            listed = few_pages if whole else few_slots
            found.append((part, listed(part.table, chosen, unit, start)))
        start = start + counts
    return found


def few_pages(table: PageTable, chosen: Chosen, unit: int, before: Int[np.ndarray, "B H"]) -> FewPages:
    """The pages of a table of (row, head)s that units are, of which `before` tokens lie elsewhere."""
    size = table.pool.page_size
    return FewPages(table, *ops.list_pages(table, _by_row(chosen), unit // size, before.reshape(-1) // size))


def few_slots(table: PageTable, chosen: Chosen, unit: int, before: Int[np.ndarray, "B H"]) -> FewSlots:
    """The tokens of a table of (row, head)s that are of those units, of which `before` tokens lie elsewhere."""
    return FewSlots(table, *ops.list_slots(table, _by_row(chosen), unit, before.reshape(-1)))


def _by_row(chosen: Chosen) -> Int[np.ndarray, "R S K"]:
    numbers: np.ndarray = chosen.numbers.reshape(-1, *chosen.numbers.shape[2:])
    return numbers


def _listed(part: PagedSegment, q: Tensor, scale: float, pages: FewPages) -> Answer:
    (b, h, g, n, d), few = q.shape, copy(part)
    lists = len(pages.lengths) // (b * h)
    few.table, few.heads = cast(PageTable, pages), h * lists  # a table as far as reading goes
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
