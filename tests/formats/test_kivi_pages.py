"""A few bits a number: when tokens become pages, what codes hold, and what writing pages anew leaves as it is."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from format_cases import LENGTHS, B, D, H, chunk, held, opened, rows_of, same
from hypothesis import given
from hypothesis import strategies as st

from kvfold.formats import POSITION, Chunk, Kivi, Spec
from kvfold.formats.flat import Flat
from kvfold.ops.codes.packing import quantise

FORM = Kivi(group=8, residual=8, channels=4)
ANEW = Kivi(group=8, residual=8, channels=4, requantise=True)


def parts_of(tokens: Chunk, sizes: list[int]) -> list[Chunk]:
    """The tokens cut into pieces of so many slots, and what is left."""
    bounds = [*np.minimum(np.cumsum([0, *sizes]), tokens.valid.shape[-1]).tolist(), tokens.valid.shape[-1]]
    return [
        Chunk(*(x[:, :, i:j] for x in (tokens.keys, tokens.values, tokens.valid)),
              {name: column[..., i:j] for name, column in tokens.columns.items()})
        for i, j in pairwise(bounds)
    ]  # fmt: skip


@given(
    lengths=st.lists(st.integers(0, 60), min_size=B * H, max_size=B * H),
    sizes=st.lists(st.integers(0, 25), max_size=6),
    group=st.sampled_from([8, 10, 16]), residual=st.sampled_from([0, 1, 8, 13]),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_streaming_gives_the_codes_of_one_shot(lengths, sizes, group, residual, bits, dtype):
    form, tokens = (
        Kivi(bits, group=group, residual=residual, channels=8),
        chunk(np.reshape(lengths, (B, H)).tolist(), dtype=dtype),
    )
    whole = opened(form, tokens)
    for pieces in (parts_of(tokens, sizes), parts_of(tokens, [1] * tokens.valid.shape[-1])):
        streamed = form.open(Spec.of(tokens))
        for piece in pieces:
            streamed.append(piece, even=bool(piece.valid.all()))
            left = streamed.tail.counts()
            assert ((left < residual + group) & ((left >= residual) | (streamed.coded.counts() == 0))).all()
        (said, mine), (other, theirs) = streamed.state(), whole.state()
        assert said == other and mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    want = [max(0, (n - residual) // group) * group for n in lengths]
    assert whole.coded.counts().reshape(-1).tolist() == want


def test_a_channel_of_keys_shares_a_scale_on_a_page_and_a_group_of_values_in_a_token():
    given = chunk(24)
    segment = opened(FORM, given)
    pool, pages = segment.coded.pool, segment.coded.table.table
    assert pages.shape == (B * H, 2) and (segment.tail.counts() == 8).all()
    for row, page in np.ndindex(*pages.shape):
        keys, values = (x.flatten(0, 1)[row, page * 8 : page * 8 + 8] for x in (given.keys, given.values))
        place = pages[row, page]
        low, high = keys.amin(0), keys.amax(0)
        assert torch.equal(pool.planes["key_zero"][place], low)
        torch.testing.assert_close(pool.planes["key_scale"][place], (high - low) / 15)
        groups = values.view(8, 2, 4)
        assert torch.equal(pool.planes["value_zero"][place], groups.amin(-1))
        torch.testing.assert_close(pool.planes["value_scale"][place], (groups.amax(-1) - groups.amin(-1)) / 15)
        stored = segment.dense()
        error = (stored.keys.flatten(0, 1)[row, page * 8 : page * 8 + 8] - keys).abs()
        assert (error <= (high - low) / 30 * 1.001).all() and error.max() > 0
        error = (stored.values.flatten(0, 1)[row, page * 8 : page * 8 + 8].view(8, 2, 4) - groups).abs()
        assert (error <= (groups.amax(-1) - groups.amin(-1))[..., None] / 30 * 1.001).all()
    assert torch.equal(segment.dense().keys[:, :, 16:], given.keys[:, :, 16:])  # the tail is exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(65504.0, -65504.0), (65504.0, 65503.0), (1e-7, 0.0), (0.0, 0.0), (30.0, 29.9)], ids=str
)
def test_finite_numbers_stay_finite(dtype, sizes):
    rng = torch.Generator().manual_seed(0)
    share = torch.rand(24, 8, generator=rng)
    values = torch.lerp(torch.tensor(sizes[0]), torch.tensor(sizes[1]), share).clamp(-65504, 65504).to(dtype)
    values = values.clamp(-65280, 65280) if dtype == torch.bfloat16 else values
    tokens = chunk([[24]], dtype=dtype)
    segment = opened(FORM, Chunk(values[None, None], values[None, None], tokens.valid, tokens.columns))
    step = (values.float().amax() - values.float().amin()) / 15
    for plane in (held(segment)[0]["keys"], held(segment)[0]["values"]):
        assert plane.isfinite().all()
        error = (plane.float() - values.float()).abs().amax()
        assert error <= 0.7 * step + 1e-6 + values.float().abs().amax() * torch.finfo(dtype).eps
    assert segment.attend(torch.zeros(1, 1, 1, 1, 8, dtype=dtype), 1.0)[0].isfinite().all()


def test_what_is_not_finite_stays_so():
    codes, scale, zero = quantise(
        torch.tensor([[1.0, torch.nan, 2.0], [1.0, torch.inf, 2.0], [1.0, 1.5, 2.0]]), 1, torch.float32, 4
    )
    read = codes.float() * scale + zero
    assert read[:2].isnan().all() and read[2].isfinite().all()


def test_the_newest_are_flushed_a_group_at_a_time():
    segment, sizes = FORM.open(Spec.of(chunk(1))), []
    for step in range(40):
        segment.append(chunk(1, step, start=step), even=True)
        sizes.append((int(segment.coded.counts()[0, 0]), int(segment.tail.counts()[0, 0])))
    assert sizes == [(max(0, n // 8 - 1) * 8, n - max(0, n // 8 - 1) * 8) for n in range(1, 41)]
    positions = held(segment)[0][POSITION]
    assert positions.tolist() == list(range(40))
    assert segment.tail.pool.pages <= 4 * B * H  # pages that tokens left are used again


def test_rows_flush_each_in_its_own_time():
    """Only what goes is read from the tail, and nobody else's tokens move."""
    segment = opened(FORM, chunk([[15, 14], [13, 8], [1, 0]]))
    assert segment.coded.longest == 0
    for step in range(2):
        before = segment.tail.table.table.copy()
        segment.append(chunk(1, step), even=True)
        flushed = segment.coded.counts().reshape(-1)
        assert flushed.tolist() == [8, 8 * step, 0, 0, 0, 0]
        after = segment.tail.table.table[:, : before.shape[1]]
        assert np.array_equal(after[2:][before[2:] >= 0], before[2:][before[2:] >= 0])


def test_what_cuts_a_page_is_refused_and_changes_nothing():
    tokens = chunk([[30, 30], [30, 30]])
    segment = opened(FORM, tokens)
    before = held(segment)
    mask = segment.columns()[0].clone()
    mask[0, 1, 3] = False
    with pytest.raises(ValueError, match=r"mask drops some tokens of a page of 8, not all.*requantise=True"):
        segment.keep(mask, {})
    slots = torch.full((2, 2, 1), -1)
    slots[1, 0] = 3
    with pytest.raises(ValueError, match=r"slots name tokens of pages that are coded.*requantise=True"):
        segment.amend(slots, torch.zeros(2, 2, 1, D), None)
    assert same(held(segment), before)


def test_whole_pages_go_without_a_code_written():
    segment = opened(FORM, chunk(48))
    planes = {name: plane.clone() for name, plane in segment.coded.table.flat().items()}
    pages, used = segment.coded.pool.pages, segment.coded.pool.used
    mask = segment.columns()[0].clone()
    mask[:, 0, 8:24], mask[1, 1, :8] = False, False
    wanted = [{n: x[mask[i]] for n, x in row.items()} for i, row in zip(np.ndindex(B, H), held(segment), strict=True)]
    segment.keep(mask, {})
    assert same(held(segment), wanted)
    assert segment.coded.pool.pages == segment.coded.pool.used == used - 7 == pages - 7
    codes = segment.coded.table.flat()
    assert torch.equal(codes["keys"][:8], planes["keys"][:8]) and torch.equal(
        codes["keys"][8:24], planes["keys"][24:40]
    )


def test_pages_before_the_first_that_loses_a_token_stay_as_they_are():
    segment = opened(ANEW, chunk(48))  # 40 coded, 8 in the tail
    before, planes = held(segment), {n: x.clone() for n, x in segment.coded.table.flat().items()}
    mask = segment.columns()[0].clone()
    mask[0, 0, 18:21] = False  # of the third page: 21 of the last three stay, that is two pages and 5
    mask[0, 1, :8] = False  # a whole one
    segment.keep(mask, {})
    assert segment.coded.counts()[:2].tolist() == [[32, 32], [40, 40]]
    assert segment.tail.counts()[:2].tolist() == [[13, 8], [8, 8]]
    codes = segment.coded.table.flat()
    assert torch.equal(codes["keys"][:16], planes["keys"][:16])
    assert torch.equal(codes["keys"][32:], planes["keys"][48:]) and torch.equal(
        codes["key_scale"][4:], planes["key_scale"][6:]
    )
    found = held(segment)
    assert found[0][POSITION].tolist() == [*range(18), *range(21, 48)]
    assert torch.equal(found[0]["keys"][:16], before[0]["keys"][:16])
    assert torch.equal(found[0]["keys"][32:], before[0]["keys"][35:])  # back in the tail as they were read
    assert same(found[2:], before[2:])


def test_a_short_tail_takes_what_no_page_holds():
    segment = opened(ANEW, chunk([[48, 47]] * B))
    mask = segment.columns()[0].clone()
    mask[..., 40:] = False  # the tails go
    mask[0, 0, 3:39] = False  # four stay
    mask[1, 0, ::2] = False  # twenty: two pages and four
    segment.keep(mask, {})
    assert segment.coded.counts().tolist() == [[0, 32], [16, 32], [40, 32]]
    assert segment.tail.counts().tolist() == [[4, 0], [4, 0], [0, 0]]
    assert held(segment)[0][POSITION].tolist() == [0, 1, 2, 39]
    for step in range(20):
        segment.append(chunk(1, step), even=True)
    assert (segment.tail.counts() >= 8).all() and (segment.tail.counts() < 16).all()


def test_a_long_tail_becomes_pages_with_what_was_in_front():
    segment = opened(ANEW, chunk(31))  # 16 coded, 15 in the tail
    mask = segment.columns()[0].clone()
    mask[0, 0, 9] = False  # 7 in front of 15: a page of both
    segment.keep(mask, {})
    assert segment.coded.counts()[0, 0] == 16 and segment.tail.counts()[0, 0] == 14
    assert held(segment)[0][POSITION].tolist() == [*range(9), *range(10, 31)]


def test_a_crop_into_a_page_reads_the_rest_of_it_back():
    segment = opened(FORM, chunk(48))
    before, planes = held(segment), segment.coded.table.flat()["keys"].clone()
    segment.truncate(np.array([[21, 16], [40, 47], [0, 5]]))
    assert segment.coded.counts().tolist() == [[16, 16], [40, 40], [0, 0]]
    assert segment.tail.counts().tolist() == [[5, 0], [0, 7], [0, 5]]
    assert torch.equal(segment.coded.table.flat()["keys"][:16], planes[:16])
    assert same(
        held(segment), [{n: x[:c] for n, x in r.items()} for r, c in zip(before, (21, 16, 40, 47, 0, 5), strict=True)]
    )


def test_amending_a_page_rounds_its_keys_anew_and_of_the_values_only_its_own():
    segment = opened(ANEW, chunk(48))
    fork = segment.select(np.arange(B))
    before = held(segment)
    slots = torch.full((B, H, 3), -1)
    slots[0, 0] = torch.tensor([17, 19, 45])
    rng = torch.Generator().manual_seed(3)
    keys, values = torch.randn(B, H, 3, D, generator=rng), torch.randn(B, H, 3, 8, generator=rng)
    segment.amend(slots, keys, values)
    found, at = held(segment), [17, 19]
    torch.testing.assert_close(found[0]["keys"][at], keys[0, 0, :2], atol=0.2, rtol=0)
    torch.testing.assert_close(found[0]["values"][at], values[0, 0, :2], atol=0.2, rtol=0)
    assert torch.equal(found[0]["keys"][45], keys[0, 0, 2]) and torch.equal(found[0]["values"][45], values[0, 0, 2])
    others = [i for i in range(48) if i not in (17, 19, 45)]
    assert torch.equal(found[0]["values"][others], before[0]["values"][others])
    outside = [i for i in others if not 16 <= i < 24]
    assert torch.equal(found[0]["keys"][outside], before[0]["keys"][outside])
    assert same(found[1:], before[1:]) and same(held(fork), before)


def test_sizes_that_are_odd():
    rng = torch.Generator().manual_seed(0)
    tokens = Chunk(
        *(torch.randn(1, 1, 30, d, generator=rng) for d in (7, 5)),
        *[getattr(chunk([[30]]), n) for n in ("valid", "columns")],
    )
    segment = opened(Kivi(group=8, residual=3), tokens)
    torch.testing.assert_close(segment.dense().keys, tokens.keys, atol=0.3, rtol=0)
    torch.testing.assert_close(segment.dense().values, tokens.values, atol=0.3, rtol=0)
    assert segment.dense().keys.shape == (1, 1, 30, 7)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=5))
def test_flat_rows_are_put_together_and_taken_apart(counts):
    one, two, cut = (np.array(x) for x in zip(*counts, strict=True))
    rows = [([10 * r + i for i in range(a)], [-10 * r - i - 1 for i in range(b)]) for r, (a, b, _) in enumerate(counts)]
    first, second = (Flat(n, {"x": torch.tensor([v for row in rows for v in row[k]])}) for k, n in ((0, one), (1, two)))
    both = first.then(second)
    assert (
        both.planes["x"].tolist() == [v for a, b in rows for v in a + b]
        and both.counts.tolist() == (one + two).tolist()
    )
    cut = np.minimum(cut, one + two)
    left, right = both.split(cut)
    assert left.planes["x"].tolist() == [v for (a, b), n in zip(rows, cut, strict=True) for v in (a + b)[:n]]
    assert right.planes["x"].tolist() == [v for (a, b), n in zip(rows, cut, strict=True) for v in (a + b)[n:]]
    more = first.then(Flat(two, {"y": torch.ones(int(two.sum()), 2)}))
    if one.any() and two.any():
        assert more.planes["y"].sum() == 2 * two.sum() and more.planes["x"].sum() == first.planes["x"].sum()


def test_rows_of_other_options_are_not_joined():
    segment = opened(FORM, chunk(LENGTHS))
    with pytest.raises(
        ValueError,
        match=r"other=Kivi\(bits=4, group=8, channels=8, .* must be of format Kivi\(bits=4, group=8, channels=4",
    ):
        segment.join(opened(Kivi(group=8, residual=8, channels=8), rows_of(chunk(LENGTHS), [0])))
