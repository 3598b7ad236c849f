"""Rows that are chosen, shared and joined, in every format."""

import numpy as np
import pytest
import torch
from format_cases import (
    ALL,
    ARENA,
    FORMATS,
    LENGTHS,
    OPERATIONS,
    B,
    H,
    arena_of,
    chunk,
    held,
    opened,
    query,
    rows_of,
    same,
)
from torch.testing import assert_close

from kvfold.formats import LOG_MASS


@ALL
@ARENA
def test_selected_rows_share_their_pages(form, arena):
    room = arena_of(arena)
    segment = opened(form, chunk(LENGTHS), arena=room)
    before, used = held(segment), room and (room.nbytes, room.used_nbytes)
    assert not segment.shared
    chosen = segment.select(np.array([2, 0, 0]))
    assert same(held(chosen), [before[row * H + head] for row in (2, 0, 0) for head in range(H)])
    assert segment.shared and chosen.shared and (room is None or (room.nbytes, room.used_nbytes) == used)
    assert (chosen.row_nbytes() == segment.row_nbytes()[[2, 0, 0]]).all()
    segment.clear()
    chosen.compact()
    assert same(held(chosen)[:H], before[2 * H :]) and not segment.counts().any() and segment.longest == 0


@ALL
@ARENA
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_one_fork_does_the_other_never_sees(form, arena, operation):
    for changed in (0, 1):
        segment = opened(form, chunk(LENGTHS), arena=arena_of(arena))
        pair = [segment, segment.select(np.arange(B))]
        lone = opened(form, chunk(LENGTHS))
        other, q = pair[1 - changed], query()
        before, out = held(other), other.attend(q, 0.3)[0]
        OPERATIONS[operation](form, pair[changed])
        OPERATIONS[operation](form, lone)
        after = [{name: plane for name, plane in row.items() if name != "age"} for row in held(other)]
        assert same(before, after) and torch.equal(other.attend(q, 0.3)[0], out)
        assert same(held(pair[changed]), held(lone))  # and it does what it does alone
        OPERATIONS["append even"](form, other)
        assert same(held(pair[changed]), held(lone))


@ALL
@ARENA
def test_joined_segments_are_the_batch(form, arena):
    given, more = chunk(LENGTHS), chunk([[9, 0], [20, 1], [1, 30]], seed=1)
    room, batch = arena_of(arena), opened(form, given)
    parts = [opened(form, rows_of(given, [row]), arena=room) for row in range(B)]
    parts[0].join(parts[1])
    parts[0].join(parts[2])
    assert same(held(parts[0]), held(batch)) and [part.longest for part in parts[1:]] == [0, 0]
    for segment in (parts[0], batch):
        segment.append(more)
    assert same(held(parts[0]), held(batch))
    assert_close(parts[0].attend(query(), 0.3)[:2], batch.attend(query(), 0.3)[:2], atol=1e-5, rtol=1e-5)
    assert parts[0].row_nbytes().shape == (B,)


@ALL
def test_what_can_not_be_joined_is_refused_and_nothing_changes(form):
    segment = opened(form, chunk(LENGTHS))
    before = held(segment)
    others = [opened(other, chunk(LENGTHS)) for other in FORMATS.values() if type(other) is not type(form)]
    others.append(opened(form, chunk(LENGTHS, dtype=torch.float16)))
    strange = chunk(LENGTHS)
    strange.columns[LOG_MASS] = strange.columns[LOG_MASS].double()
    others.append(opened(form, strange))
    for other in others:
        theirs = held(other)
        with pytest.raises(ValueError, match="other"):
            segment.join(other)
        assert same(held(other), theirs)
    assert same(held(segment), before)
