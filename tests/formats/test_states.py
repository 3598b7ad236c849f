"""What a segment says that it holds, and the segment that is made of it, in every format."""

import numpy as np
import pytest
import torch
from format_cases import (
    ALL,
    ARENA,
    FORMATS,
    LENGTHS,
    B,
    arena_of,
    chunk,
    held,
    indexes,
    mask_for,
    opened,
    pieces,
    query,
    same,
    spec_of,
)

from kvfold.formats import POSITION, Depth, Indexed, Kivi, Sparse, Thin
from kvfold.pages import Arena


@ALL
@ARENA
@pytest.mark.parametrize("worn", [False, True], ids=["fresh", "worn"])
def test_a_restored_segment_goes_on_bit_for_bit(form, arena, worn):
    room, given = arena_of(arena), chunk(LENGTHS)
    segment = opened(form, given, arena=room)
    if worn:
        for seed, share in enumerate((0.97, 0.9)):
            segment.keep(
                mask_for(form, segment, seed, share), {"age": torch.rand(segment.columns()[0].shape)}, slack=True
            )
            segment.append(chunk([[2, 1], [0, 3], [5, 30]], seed=seed))
    said, tensors = segment.state()
    assert said["counts"] == segment.counts().tolist()
    stored = {name: x.clone() for name, x in tensors.items()}
    again = form.restore(spec_of(given, arena=arena_of(arena)), said, stored)
    for step in range(3):
        assert same(held(again), held(segment)) and torch.equal(again.columns()[0], segment.columns()[0])
        for mine, theirs in zip(again.attend(query(2, step), 0.3), segment.attend(query(2, step), 0.3), strict=True):
            assert theirs is None or torch.equal(mine, theirs)
        for x in (segment, again):
            x.append(chunk([[5, 9], [1, 0], [20, 2]], seed=10 + step))
    left, right = segment.state(), again.state()
    assert left[0] == right[0] and left[1].keys() == right[1].keys()
    assert all(torch.equal(left[1][name], right[1][name]) for name in left[1])


@pytest.mark.parametrize("form", [form for form in FORMATS.values() if form.traits.addressed == "token"], ids=str)
def test_holes_are_not_stored(form):
    segment = opened(form, given := chunk(LENGTHS))
    valid, columns = segment.columns()
    segment.keep(valid & (columns[POSITION] != 2), {}, slack=True)
    assert any(part.table.holed for part in pieces(segment)) != isinstance(form, Indexed)  # which has no gaps
    said, tensors = segment.state()
    again = form.restore(spec_of(given), said, tensors)
    assert same(held(again), held(segment)) and again.counts().tolist() == [[40, 16], [0, 29], [8, 7]]


@ALL
def test_an_empty_segment_can_be_stored(form):
    given = chunk([[0, 0]] * B)
    said, tensors = opened(form, given).state()
    again = form.restore(spec_of(given), said, tensors)
    assert again.longest == 0 and not again.counts().any()
    again.append(chunk(LENGTHS))
    assert same(held(again), held(opened(form, chunk(LENGTHS))))


@ALL
def test_pages_that_two_hold_are_stored_once(form):
    segment = opened(form, chunk(LENGTHS))
    twin = segment.select(np.arange(B))
    assert segment.same_pages(twin) and not segment.same_pages(opened(form, chunk(LENGTHS)))
    said, tensors = segment.state()
    short, few = twin.state(of="0.1")
    assert not few and short == said
    spec = spec_of(chunk(LENGTHS))
    one = form.restore(spec, said, tensors)
    two = form.restore(spec, short, few, twin=one)
    assert one.same_pages(two) and same(held(two), held(segment))
    counted = set()
    assert one.bytes_beside(counted) == one.nbytes and two.bytes_beside(counted) - indexes(two) < 0.2 * two.nbytes
    with pytest.raises(ValueError, match=r"counts=.* must be those of the segment that holds the same pages"):
        form.restore(spec, {**short, "counts": [[41, 17], [0, 30], [9, 9]]}, few, twin=one)


@ALL
def test_a_damaged_state_is_refused_before_anything_is_allocated(form):
    given = chunk(LENGTHS)
    said, tensors = opened(form, given).state()
    name = next(name for name in tensors if name.endswith("keys"))
    other = next(name for name in tensors if name.endswith(POSITION))
    damages = {
        name: [{**tensors, name: tensors[name][1:]}, {**tensors, name: tensors[name].double()}],
        other: [{n: x for n, x in tensors.items() if n != other}, {**tensors, other: tensors[other][:, None]}],
        "extra": [{**tensors, "extra": torch.ones(3)}],
    }
    room = Arena(1 << 20)
    spec = spec_of(given, arena=room)
    for wrong, states in damages.items():
        for damaged in states:
            with pytest.raises(ValueError, match=wrong.split(".")[-1]):
                form.restore(spec, said, damaged)
    for counts in ([[41, 17], [0, 30]], [[41, 17], [0, 30], [9, -8]], "many", [[41, 17], [0, 30.0], [9, 8]], None):
        with pytest.raises(ValueError, match="counts="):
            form.restore(spec, {**said, "counts": counts}, tensors)
    if isinstance(form, Kivi):
        with pytest.raises(ValueError, match=r"coded=.* must be multiples of group=8"):
            form.restore(spec, {**said, "coded": [[31, 8], [0, 16], [0, 0]]}, tensors)
    if isinstance(form, Sparse):
        with pytest.raises(ValueError, match=r"coded=.* must be at most counts="):
            form.restore(spec, {**said, "coded": [[48, 8], [0, 16], [0, 0]]}, tensors)
        maps = tensors["coded.key_map"].clone()
        maps[2] = 255
        with pytest.raises(ValueError, match="key_map of token 2 must mark 9 of 16 channels"):
            form.restore(spec, said, {**tensors, "coded.key_map": maps})
    if isinstance(form, Thin):
        channels = tensors["channels"].clone()
        channels[0, 0] = True
        for wrong in (channels, channels.int(), channels[1:]):
            with pytest.raises(ValueError, match="channels must"):
                form.restore(spec, said, {**tensors, "channels": wrong})
    if isinstance(form, Depth):
        with pytest.raises(ValueError, match="upto=None must be 3 ints"):
            form.restore(spec, {**said, "upto": None}, tensors)
    assert not room.pools
    assert same(held(form.restore(spec, said, tensors)), held(opened(form, given)))
