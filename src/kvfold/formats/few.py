"""A query that reads some stretches of a segment's tokens alone, as pages or by a mask; one that says which."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats.chosen import Chosen
from kvfold.formats.index import Giving, Handed
from kvfold.formats.paged import PagedSegment
from kvfold.formats.parts import Answer, merged
from kvfold.formats.segment import Segment
from kvfold.formats.tailed import TailedSegment
from kvfold.pages import FewPages, FewSlots, PageTable
from kvfold.rotation import Compact, Rope


def attend_few(
    segment: Segment, q: Float[Tensor, "B H G 1 D"], scale: float, chosen: Chosen, unit: int, *, weights: bool = False,
    slots: Rope | None = None, seen: Int[np.ndarray, " B"] | None = None, rows: Bool[np.ndarray, " B"] | None = None,
    compact: Compact | None = None,
) -> Answer:  # fmt: skip
    """(out, lse, what each slot got) over the tokens of the units that are chosen, `unit` tokens each.

    Where units are whole pages of what holds them those pages are all that is read, else their tokens are, where the
    format reads tokens one by one: it costs what is read. Elsewhere the segment is told which slots to read. `slots`:
    what is read attends at positions 0, 1, 2, ... in its order, and the query, which stands at text position `seen[b]`
    - 1, at the last of them; in `rows` alone, where not all choose. `compact`: where keys stand otherwise; the query
    is at its own place.
    """
    parts = segment.parts if isinstance(segment, TailedSegment) else (segment,)
    if not weights and (slots is None or len(parts) == 1):
        pages = _pages(parts, chosen, unit, turned=compact is not None)
        if pages is not None:
            found = [_listed(part, q, scale, some, _slots(slots, rows, q), seen, compact) for part, some in pages]
            return merged(found, weights=False)
    return _masked(segment, q, scale, chosen, unit, weights, _slots(slots, rows, q), seen, compact)


def _slots(rope: Rope | None, rows: Bool[np.ndarray, " B"] | None, q: Tensor) -> Compact | None:
    """How keys come to stand side by side, in some rows or in all of them."""
    if rope is None:
        return None
    return Compact(rope, rows=None if rows is None or rows.all() else torch.from_numpy(rows).to(q.device))


def near(device: torch.device, rope: Rope | None, seen: Int[np.ndarray, " B"], far: int) -> Compact | None:
    """Keys more than `far` (0: none) tokens behind the last of a text stand as far away as that; None: there are none.

    So two parts, one at true distances and one at a single distance, are read under one softmax (InfLLM).
    """
    if not far or rope is None or (seen <= far).all():
        return None
    return Compact(rope, least=torch.from_numpy(seen - far).to(device))


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
    number = ((valid.cumsum(-1) - 1).clamp(min=0) // unit).clamp(max=chosen.total - 1)
    units = torch.from_numpy(chosen.mask).to(valid.device)
    slots = units.gather(-1, number[:, :, None].expand(*units.shape[:3], -1))
    return slots & valid[:, :, None]


def _turned(
    q: Float[Tensor, "B H G 1 D"], compact: Compact, seen: Int[np.ndarray, " B"], counts: Int[Tensor, "B H"]
) -> Float[Tensor, "B H G 1 D"]:
    """The query of each text's last token where the last of `counts` slots is."""
    return compact.rotate_queries(q, torch.from_numpy(seen - 1).to(q.device)[:, None], counts - 1)


def _pages(
    parts: Sequence[object], chosen: Chosen, unit: int, *, turned: bool
) -> list[tuple[PagedSegment, FewPages]] | None:
    """Each part that holds tokens, and the pages of those units in it, or their slots; None where it reads neither.

    Keys that are `turned` are those of slots, one by one.
    """
    found: list[tuple[PagedSegment, FewPages]] = []
    start: Int[np.ndarray, "B H"] = np.zeros(chosen.counts.shape[:2], dtype=np.int64)
    for part in parts:
        if not isinstance(part, PagedSegment) or not part.listed or part.table.holed:
            return None
        size, counts = part.pool.page_size, part.counts()
        whole = not (turned or unit % size or (start % size).any())
        single = part.singled and part.pool.device.type == "cpu" and part.pool.memory is None  # a block is no token's
        if not whole and not single:
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


def _listed(
    part: PagedSegment, q: Tensor, scale: float, pages: FewPages, slots: Compact | None, seen: np.ndarray | None,
    compact: Compact | None,
) -> Answer:  # fmt: skip
    (b, h, g, n, d), few = q.shape, copy(part)
    lists = len(pages.lengths) // (b * h)
    few.table, few.heads = cast(PageTable, pages), h * lists  # a table as far as reading goes
    asks = q.reshape(b, h * lists, g // lists, n, d)
    if slots is not None and seen is not None:
        compact, counts = slots, torch.from_numpy(pages.lengths.astype(np.int64)).to(q.device)
        asks = _turned(asks, compact, seen, counts.view(b, -1))
    out, lse, _ = few.attend(asks, scale, compact=compact)
    return out.reshape(b, h, g, n, -1), lse.reshape(b, h, g, n), None


def _masked(
    segment: Segment, q: Tensor, scale: float, chosen: Chosen, unit: int, weights: bool, side_by_side: Compact | None,
    seen: np.ndarray | None, compact: Compact | None,
) -> Answer:  # fmt: skip
    valid, _ = segment.columns()
    slots, lists, found = read_slots(valid, chosen, unit), chosen.counts.shape[2], list[Answer]()
    for read, asked in zip(slots.unbind(2), q.chunk(lists, 2), strict=True):
        asks = asked
        if side_by_side is not None and seen is not None:
            compact = replace(side_by_side, slots=read.cumsum(-1) - 1)
            asks = _turned(asked, compact, seen, read.sum(-1))
        found.append(segment.attend(asks, scale, read=read, compact=compact, weights=weights))
    if lists == 1:
        return found[0]
    outs, norms, lefts = zip(*found, strict=True)
    known = None if any(left is None for left in lefts) else torch.cat(lefts, 2)
    return torch.cat(outs, 2), torch.cat(norms, 2), known
