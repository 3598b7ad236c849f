"""Tokens that are cropped, dropped and written over, in every format."""

import numpy as np
import pytest
import torch
from format_cases import (
    ALL,
    ARENA,
    DV,
    FORMATS,
    LENGTHS,
    B,
    D,
    H,
    arena_of,
    chunk,
    held,
    mask_for,
    opened,
    query,
    same,
    softmax,
)
from torch.testing import assert_close

from kvfold.formats import LOG_MASS, POSITION, Rotated, Thin, Uneven

PAGED = [name for name in FORMATS if name.startswith("kivi")]


@ALL
@ARENA
@pytest.mark.parametrize("counts", [[[40, 17], [0, 29], [3, 8]], [[17, 2], [0, 30], [9, 0]], [[0, 0]] * B], ids=str)
@pytest.mark.parametrize("slack", [False, True])
def test_a_crop_leaves_the_first_tokens(form, arena, counts, slack):
    segment = opened(form, chunk(LENGTHS), arena=arena_of(arena))
    before, nbytes = held(segment), segment.nbytes
    segment.truncate(np.array(counts), slack=slack)
    wanted = [{n: x[:c] for n, x in row.items()} for row, c in zip(before, np.ravel(counts), strict=True)]
    assert segment.counts().tolist() == counts and same(held(segment), wanted)
    assert slack or segment.nbytes < nbytes
    segment.append(chunk(20, seed=4), even=True)
    new = held(chunk(20, seed=4))
    for mine, old, late in zip(held(segment), wanted, new, strict=True):
        assert torch.equal(mine[POSITION], torch.cat([old[POSITION], late[POSITION]]))


@ALL
@ARENA
@pytest.mark.parametrize("slack", [False, True])
def test_what_is_not_kept_is_gone_and_so_is_its_memory(form, arena, slack):
    segment = opened(form, chunk(60), arena=arena_of(arena))
    before, nbytes = held(segment), segment.nbytes
    mask, valid = mask_for(form, segment, share=0.4), segment.columns()[0]
    noted = torch.arange(valid.numel()).view(valid.shape).float()
    segment.keep(mask, {LOG_MASS: noted}, slack=slack)
    marks = [mask[i][valid[i]] for i in np.ndindex(B, H)]
    wanted = [{n: x[m] for n, x in row.items()} for row, m in zip(before, marks, strict=True)]
    for i, row in enumerate(wanted):
        row[LOG_MASS] = noted.flatten(0, 1)[i][mask.flatten(0, 1)[i]]
    found = held(segment)
    if form.traits.requantises:
        for mine, theirs in zip(found, wanted, strict=True):
            for name in (POSITION, LOG_MASS):
                assert torch.equal(mine[name], theirs[name])
            for name in ("keys", "values"):
                assert_close(mine[name], theirs[name], atol=0.6, rtol=0)  # two roundings to 16 steps
                assert (mine[name] - theirs[name]).abs().mean() < 0.15
    else:
        assert same(found, wanted)
    assert slack or segment.nbytes < 0.75 * nbytes
    assert segment.attend(query(), 0.3)[0].isfinite().all()
    segment.keep(torch.zeros_like(segment.columns()[0]), {})
    fixed = segment.basis.nbytes if isinstance(form, Rotated) and form.key else 0
    assert not segment.counts().any() and segment.longest == 0 and segment.nbytes - fixed < 0.1 * nbytes


@pytest.mark.parametrize("name", PAGED)
def test_a_token_of_a_page_goes_only_where_pages_may_be_written_anew(name):
    form = FORMATS[name]
    segment = opened(form, chunk(LENGTHS))
    before, state = held(segment), segment.state()
    mask = segment.columns()[0].clone()
    mask[0, 0, 3] = False
    slots = torch.full((B, H, 1), -1)
    slots[0, 0] = 3
    new = torch.ones(B, H, 1, D)
    if form.requantise:
        segment.amend(slots, new, None)
        assert_close(held(segment)[0]["keys"][3], torch.ones(D), atol=0.3, rtol=0)
        assert all(same([a], [b]) for a, b in zip(held(segment)[1:], before[1:], strict=True))
        segment.keep(mask, {})
        assert segment.counts()[0, 0] == LENGTHS[0][0] - 1
        return
    for wrong in (
        lambda: segment.keep(mask, {"age": torch.ones(mask.shape)}),
        lambda: segment.amend(slots, new, None),
    ):
        with pytest.raises(ValueError, match=r"that takes Kivi\(requantise=True\)"):
            wrong()
    assert same(held(segment), before) and segment.state()[0] == state[0]


@ALL
def test_what_is_amended_is_read(form):
    segment = opened(form, chunk(LENGTHS))
    valid, before = segment.columns()[0], held(segment)
    first = max(0, segment.longest - 12)  # of pages only the tail
    slots = torch.where(valid[..., first:], torch.arange(first, segment.longest), -1)[..., ::5]
    rng = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(*slots.shape, d, generator=rng) for d in (D, DV))
    segment.amend(slots, keys, None)
    segment.amend(slots, None, values)
    tokens = segment.dense()
    # Rotated errs by a vector's length, and as its basis stretches; Uneven, where nobody has measured, has levels far
    # apart at the ends.
    most = (0.6 if form.key else 0.3) if isinstance(form, Rotated) else 0.5 if isinstance(form, Uneven) else 0.15
    for i in np.ndindex(B, H):
        some = slots[i] >= 0
        at = slots[i][some]
        kept = segment.channels[i] if isinstance(form, Thin) else torch.ones(D, dtype=torch.bool)
        assert_close(tokens.keys[i][at], keys[i][some] * kept, atol=most, rtol=0)
        assert_close(tokens.values[i][at], values[i][some], atol=most, rtol=0)
        rest = valid[i].clone()
        rest[at] = False
        old = before[i[0] * H + i[1]]
        assert torch.equal(tokens.keys[i][rest], old["keys"][rest[valid[i]]])
        assert torch.equal(tokens.columns[POSITION][i][valid[i]], old[POSITION])
    want, _, _ = softmax(segment, query(), 0.3)
    assert_close(segment.attend(query(), 0.3)[0], want, atol=2e-5, rtol=1e-5)
