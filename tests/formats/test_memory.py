"""Bytes held and bytes written, in every format."""

import numpy as np
import pytest
import torch
from format_cases import (
    ALL,
    ARENA,
    DV,
    FORMATS,
    LENGTHS,
    OPERATIONS,
    B,
    D,
    H,
    arena_of,
    chunk,
    held,
    indexes,
    opened,
    pieces,
    plain,
    reachable,
    same,
)

from kvfold.formats import Balanced, Dense, Depth, Fp8, Kivi, Rotated, Separable, Sparse, Thin, Uneven
from kvfold.pages import Arena, OutOfPages


@ALL
def test_bytes_are_those_of_all_tensors_that_can_be_reached(form):
    segment = opened(form, chunk(LENGTHS))
    assert segment.nbytes == reachable(segment)
    for operation in OPERATIONS.values():
        operation(form, segment)
        assert segment.nbytes == reachable(segment)
    segment.append(chunk(9), even=True)
    fork = segment.select(np.arange(B))
    assert fork.nbytes == reachable(fork)
    counted = set()
    assert segment.bytes_beside(counted) + fork.bytes_beside(counted) == reachable([segment, fork])


@ALL
def test_bytes_in_an_arena_are_those_of_the_pages_held(form):
    room, other = Arena(1 << 22), Arena(1 << 22)
    segment = opened(form, chunk(LENGTHS), arena=room)
    used = room.used_nbytes
    assert segment.row_nbytes().sum() == used + indexes(segment)
    fork, more = segment.select(np.arange(B)), opened(form, chunk(20), arena=room)
    assert segment.nbytes == fork.nbytes == opened(form, chunk(LENGTHS), arena=other).nbytes
    assert room.used_nbytes == used + more.row_nbytes().sum() - indexes(more)
    counted = set()
    parts = [x.bytes_beside(counted) for x in (segment, fork, more)]
    tables = [part.table for x in (segment, fork, more) for part in pieces(x)]
    beside = sum(a.nbytes for t in tables for a in (t.table, t.lengths, t.holes, t.hole_count))
    beside += indexes(segment, fork, more) + sum(getattr(x, "seen", EMPTY).nbytes for x in (segment, fork, more))
    beside += sum(x.upto.nbytes for x in (segment, fork, more)) if isinstance(form, Depth) else 0
    beside += sum(x.channels.nbytes for x in (segment, fork, more)) if isinstance(form, Thin) else 0
    beside += sum(x.told.nbytes for x in (segment, fork, more)) if isinstance(form, Balanced) else 0
    beside += sum(x.coded.weights.nbytes for x in (segment, fork, more)) if isinstance(form, Separable) else 0
    beside += sum(x.told.nbytes for x in (segment, fork, more)) if isinstance(form, Uneven) else 0
    beside += segment.basis.nbytes if isinstance(form, Rotated) and form.key else 0  # which all of them share
    assert sum(parts) == room.used_nbytes + beside


EMPTY = np.zeros(0)
BYTES = {
    "bounds": lambda d, dv, n: n * (d + dv) + 4 + 2 * min(n, 2) * d / 4,
    "bounds-kivi": lambda d, dv, n: (d + dv) / 2 + 4 + 2 * n * d / 8 + 2 * n * dv / 8 + 2 * min(n, 2) * d / 8,
    "balanced": lambda d, dv, n: (d + dv) / 2 + 4 + 8 * n,
    "dense": lambda d, dv, n: n * (d + dv) + 4,
    "hierarchical-heads": lambda d, dv, n: n * (d + dv) + 4 + min(n, 2) * d / 4,  # of one head of two
    "takes": lambda d, dv, n: n * (d + dv) + 4,
    "bf16": lambda d, dv, n: 2 * (d + dv) + 4,
    "depth": lambda d, dv, n: n * (d + dv) + 4 + 2 * 4,
    "fp8": lambda d, dv, n: d + dv + 4 + 2 * 4,
    "kivi": lambda d, dv, n: (d + dv) / 2 + 4 + 2 * n * d / 8 + 2 * n * dv / 4,
    "kivi-anew": lambda d, dv, n: (d + dv) / 2 + 4 + 2 * n * d / 8 + 2 * n * dv / 8,
    "sparse": lambda d, dv, n: n * (d // 2 + 1 + dv // 2 + 1) + d / 8 + dv / 8 + 4,
    "thin": lambda d, dv, n: n * (3 * d / 4 + dv) + 4,
    "separable": lambda d, dv, n: (d + dv) / 2 + 4 + 2 * n * d / 8 + 2 * n,
    "values": lambda d, dv, n: n * (d + dv) + 4,
    "products": lambda d, dv, n: n * (d + dv) + 4 + 2,
    "rotated": lambda d, dv, n: d / 2 + dv / 2 + 4 + 2 * n,
    "rotated-basis": lambda d, dv, n: d / 2 + dv / 2 + 4 + 2 * n,
    "uneven": lambda d, dv, n: (d + dv) / 2 + 4 + 2 * 2 * (n + 1) + 2 * n,
}
"""Bytes of a token, with its position, where the model's numbers have n bytes."""


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bytes_are_as_few_as_promised(name, dtype):
    segment = opened(FORMATS[name], chunk(1600, dtype=dtype, mass=False))
    tokens, wanted = 1600 * B * H, BYTES[name](D, DV, dtype.itemsize)
    assert segment.nbytes < 1.06 * tokens * wanted + (8 + 16) * B * H * (D + DV) * dtype.itemsize  # and a tail
    assert segment.nbytes > tokens * wanted


@ALL
@ARENA
def test_one_more_token_is_written_where_it_goes_and_nowhere_else(form, arena):
    """Every other page stays bit for bit what it was; under its own number, where the table has not moved."""
    segment = opened(form, chunk(LENGTHS), arena=arena_of(arena))
    for step in range(60):
        tables = [part.table for part in pieces(segment)]
        stores = [table.pool.planes["keys"] for table in tables]
        before = [(t.lengths, t.table, {n: x.clone() for n, x in t.pool.planes.items()}) for t in tables]
        segment.append(chunk(1, 100 + step), even=True)
        for table, store, (lengths, pages, planes) in zip(tables, stores, before, strict=True):
            coded, size = isinstance(plain(form), Kivi | Sparse) and table is tables[0], table.pool.page_size
            more = int((table.lengths - lengths).sum()) if coded else B * H
            laid = table.pool.planes["keys"] is not store  # the pool has grown, and rows may have moved
            if laid and isinstance(plain(form), Kivi | Sparse) and not coded:
                continue  # whose pages also move up
            width = min(pages.shape[1], table.table.shape[1])
            filled = np.arange(width) < -(-lengths // size)[:, None]
            was, now = pages[:, :width][filled], table.table[:, :width][filled]
            assert (
                laid or np.array_equal(was, now) or not (coded or isinstance(plain(form), Dense | Depth | Fp8 | Thin))
            )
            for name, old in planes.items():
                new, spec = table.pool.planes[name], table.pool.specs[name]
                new, old = (new[now], old[was]) if laid else (new, old)
                changed = torch.ne(new, old).reshape(*old.shape[: 1 if spec.per_page else 2], -1).any(-1)
                assert int(changed.sum()) <= (more // size if spec.per_page else more), name
        if isinstance(plain(form), Kivi | Sparse):
            assert (pieces(segment)[1].counts() <= plain(form).residual + plain(form).group - 1).all()


@ALL
def test_a_full_arena_refuses_whole_steps(form):
    room, given = Arena(1 << 22), chunk([[41, 17], [3, 30], [9, 8]])
    segment = opened(form, given, arena=room)
    fork = segment.select(np.arange(B))
    room.capacity = room.nbytes
    refused = 0
    for step in range(80):
        new, before = chunk([[1, 0], [1, 1], [3, 0]], 100 + step), held(segment)
        counts, pages = new.valid.sum(-1).numpy(), segment.pages_for(new.valid.sum(-1).numpy())
        try:
            segment.append(new)
        except OutOfPages:
            refused += 1
            assert same(held(segment), before) and any(count > pool.free for pool, count in pages.items())
            if refused == 1:
                fork.clear()
            else:
                room.capacity += 4096
        else:
            assert (segment.counts().sum() - counts.sum()) == sum(len(row["keys"]) for row in before)
    assert refused > 2 and room.nbytes <= room.capacity
    room.capacity = 1 << 22
    room.check(segment.pages_for(np.full((B, H), 40)))
    sizes = [pool.pages for pool in room.pools]
    segment.append(chunk(40, seed=3), even=True)
    assert [pool.pages for pool in room.pools] == sizes  # what it had asked for was enough


@ALL
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
def test_what_finds_no_room_changes_nothing(form, operation, shared):
    """The same operation with ever more room: refused as a whole, or done as it is done elsewhere."""
    done, free = [], 0
    lone = opened(form, chunk(LENGTHS))
    OPERATIONS[operation](form, lone)
    while not done:
        room = Arena(1 << 22)
        segment = opened(form, chunk(LENGTHS), arena=room)
        fork = segment.select(np.arange(B)) if shared else segment
        room.capacity, before = room.nbytes + free, held(segment)
        try:
            OPERATIONS[operation](form, segment)
        except OutOfPages:
            found = [{n: x for n, x in row.items() if n != "age" or n in before[0]} for row in held(segment)]
            assert same(found, before) and room.nbytes <= room.capacity
        else:
            assert same(held(segment), held(lone))
            done.append(free)
        assert segment is fork or same([{n: x for n, x in r.items() if n != "age"} for r in held(fork)], before)
        free += 500
    assert free <= 40_000 and (shared or operation.startswith(("append", "a column", "keep", "note")) or free == 500)
