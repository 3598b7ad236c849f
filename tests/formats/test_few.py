"""Some stretches of a segment's tokens, read alone: what a mask of their slots gives, whatever they lie in."""

import numpy as np
import pytest
import torch
from format_cases import ALL, LENGTHS, B, G, H, chunk, opened, query, softmax
from torch.testing import assert_close

from kvfold.formats import Chosen, Dense, Format, Fp8, Segment
from kvfold.formats.few import attend_few, few_pages, few_slots
from kvfold.formats.paged import PagedSegment


def drawn(segment: Segment, unit: int, lists: int, seed: int = 0, share: float = 0.5) -> np.ndarray:
    """Random units of each (row, head), beyond its last one too."""
    number = -(-int(segment.counts().max(initial=1)) // unit) + 1
    return np.random.default_rng(seed).random((B, H, lists, number)) < share


def by_mask(segment: Segment, chosen: np.ndarray, unit: int, n: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    valid, _ = segment.columns()
    number = ((valid.cumsum(-1) - 1).clamp(min=0) // unit).clamp(max=chosen.shape[-1] - 1)
    found = []
    for s, asked in enumerate(query(n).chunk(chosen.shape[2], 2)):
        read = torch.from_numpy(chosen[:, :, s]).gather(-1, number)
        found.append(softmax(segment, asked, 0.3, read)[:2])
    outs, norms = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(norms, 2)


@ALL
@pytest.mark.parametrize("unit", [3, 8, 16])
@pytest.mark.parametrize("lists", [1, G])
@pytest.mark.parametrize("lengths", [LENGTHS, 24, 1], ids=str)
def test_units_are_the_tokens_that_they_name(form: Format, unit: int, lists: int, lengths):
    segment = opened(form, chunk(lengths))
    chosen = drawn(segment, unit, lists)
    out, lse, _ = attend_few(segment, query(), 0.3, Chosen.of(chosen), unit)
    want, norm = by_mask(segment, chosen, unit)
    assert_close(out, want, atol=2e-5, rtol=1e-5)
    assert_close(lse, norm, atol=2e-5, rtol=1e-5)


@ALL
def test_weights_are_those_of_the_tokens_that_were_read(form: Format):
    segment = opened(form, chunk(LENGTHS))
    chosen = drawn(segment, 8, G)
    *_, left = attend_few(segment, query(), 0.3, Chosen.of(chosen), 8, weights=True)
    assert left is None or (
        left.shape == (B, H, G, 1, segment.longest) and bool(((left.sum(-1) - 1).abs() < 1e-5).any())
    )


def test_what_is_not_read_is_not_looked_at():
    segment = opened(Dense(page_size=8), chunk(40))
    chosen = drawn(segment, 8, G, seed=1)
    chosen[..., 2] = False
    clean, *_ = attend_few(segment, query(), 0.3, Chosen.of(chosen), 8)
    for name in ("keys", "values"):
        segment.table.pool.planes[name][torch.from_numpy(segment.table.table[:, 2].astype(np.int64))] = torch.nan
    found, *_ = attend_few(segment, query(), 0.3, Chosen.of(chosen), 8)
    assert torch.equal(clean, found)


def test_pages_are_read_as_pages_where_they_can_be(monkeypatch):
    """A cost in what is read, not in all there is: the mask is the way of formats that have no other."""
    asked = []
    plain = PagedSegment.columns
    monkeypatch.setattr(PagedSegment, "columns", lambda self: asked.append(self) or plain(self))
    for form, unit, masked in ((Dense(page_size=8), 16, False), (Dense(page_size=8), 12, False), (Fp8(), 12, True)):
        segment = opened(form, chunk(LENGTHS))
        attend_few(segment, query(), 0.3, Chosen.of(drawn(segment, unit, G)), unit)
        assert bool(asked) == masked


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_that_are_not_chosen_are_not_read(unit: int, dtype: torch.dtype):
    segment = opened(Dense(dtype=dtype, page_size=8), chunk(LENGTHS))
    chosen = drawn(segment, unit, G, seed=2, share=0.3)
    want, norm = by_mask(segment, chosen, unit)
    read = np.zeros(segment.table.pool.pages * 8, dtype=bool)
    few = few_slots(segment.table, Chosen.of(chosen), unit, np.zeros((B, H), dtype=np.int64))
    for slots, length in zip(few.table, few.lengths, strict=True):
        read[slots[:length]] = True
    assert read.any() and not read.all()
    for name in ("keys", "values"):
        segment.table.pool.planes[name].flatten(0, 1)[torch.from_numpy(~read)] = torch.nan
    out, lse, _ = attend_few(segment, query(), 0.3, Chosen.of(chosen), unit)
    assert_close(out, want, atol=2e-5, rtol=1e-5)
    assert_close(lse, norm, atol=2e-5, rtol=1e-5)


def test_a_list_holds_no_page_and_copies_none():
    segment = opened(Dense(page_size=8), chunk(40))
    table = segment.table
    used, tables = table.pool.used, len(table.pool.tables)
    every = Chosen.of(np.ones((B, H, 1, 5), dtype=bool))
    few = few_pages(table, every, 8, np.zeros((B, H), dtype=np.int64))
    assert few.table.tolist() == table.table[:, :5].tolist() and few.lengths.tolist() == table.lengths.tolist()
    del few
    assert table.pool.used == used and len(table.pool.tables) == tables
    segment.keep(torch.arange(segment.longest) != 3 + torch.zeros(B, H, 1), {}, slack=True)
    if segment.table.holed:
        with pytest.raises(ValueError, match="holes"):
            few_pages(table, every, 8, np.zeros((B, H), dtype=np.int64))
