"""Segments against a plain list of lists, through any order of operations, with forks that share pages."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold.formats import POSITION, Chunk, Dense, DenseSegment
from kvfold.pages import PagePool

HEADS, WIDTH, PAGE = 2, 3, 4
Token = tuple[int, float]  # its number, and the column "score" (0 where nobody set one)


class Segments(RuleBasedStateMachine):
    """`live` holds segments beside what they must contain, one list of tokens for each (sequence, head)."""

    def __init__(self):
        super().__init__()
        self.live: list[tuple[DenseSegment, list[list[Token]]]] = []
        self.pools: dict[int, PagePool] = {}
        self.next = 0

    def chunk(self, valid: torch.Tensor, scored: bool) -> tuple[Chunk, list[list[Token]]]:
        b, h, t = valid.shape
        numbers = torch.arange(self.next, self.next + b * h * t, dtype=torch.int32).view(b, h, t)
        self.next += numbers.numel()
        columns = {POSITION: numbers}
        if scored:
            columns["score"] = numbers.float() / 2
        keys = numbers[..., None].expand(b, h, t, WIDTH).float()
        new = [
            [(n, n / 2 if scored else 0.0) for n in numbers[row, head][valid[row, head]].tolist()]
            for row, head in np.ndindex(b, h)
        ]
        return Chunk(keys, -keys, valid, columns), new

    def pick(self, data) -> tuple[DenseSegment, list[list[Token]]]:
        return data.draw(st.sampled_from(self.live))

    def mask(self, data, shape: tuple[int, ...]) -> torch.Tensor:
        seed, share = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share

    @initialize(batch=st.integers(1, 3), length=st.integers(0, 9))
    def start(self, batch, length):
        """A segment and a fork of it: most of what can go wrong needs two holders."""
        chunk, model = self.chunk(torch.ones(batch, HEADS, length, dtype=torch.bool), scored=False)
        segment = Dense(page_size=PAGE).segment(chunk)
        segment.append(chunk, even=True)
        fork = segment.select(np.arange(batch))
        self.live = [(segment, model), (fork, [list(row) for row in model])]

    @rule(data=st.data(), length=st.integers(0, 11), scored=st.booleans())
    def append(self, data, length, scored):
        segment, model = self.pick(data)
        chunk, new = self.chunk(self.mask(data, (len(model) // HEADS, HEADS, length)), scored)
        segment.append(chunk)
        for row, more in zip(model, new, strict=True):
            row.extend(more)

    @rule(data=st.data(), length=st.integers(1, 6), scored=st.booleans())
    def append_even(self, data, length, scored):
        segment, model = self.pick(data)
        chunk, new = self.chunk(torch.ones(len(model) // HEADS, HEADS, length, dtype=torch.bool), scored)
        segment.append(chunk, even=True)
        for row, more in zip(model, new, strict=True):
            row.extend(more)

    @rule(data=st.data(), rescore=st.booleans(), slack=st.booleans())
    def keep(self, data, rescore, slack):
        segment, model = self.pick(data)
        valid = segment.dense().valid
        mask = self.mask(data, tuple(valid.shape)) & valid
        if slack and data.draw(st.booleans()):  # few at a time, so that they leave holes
            mask = valid & (torch.arange(valid.shape[-1]) != data.draw(st.integers(0, 9)))
        column = torch.arange(valid.numel()).view(valid.shape).float()
        segment.keep(mask, {"score": column} if rescore else {}, slack=slack)
        for row, marks, held, scores in zip(model, *(x.flatten(0, 1) for x in (mask, valid, column)), strict=True):
            slots = held.nonzero()[:, 0].tolist()
            kept = [(n, s, slot) for (n, s), slot in zip(row, slots, strict=True) if marks[slot]]
            row[:] = [(n, scores[slot].item() if rescore else s) for n, s, slot in kept]

    @rule(data=st.data())
    def truncate(self, data):
        segment, model = self.pick(data)
        counts = [data.draw(st.integers(0, len(row) + 2)) for row in model]
        segment.truncate(np.array(counts).reshape(-1, HEADS))
        for row, count in zip(model, counts, strict=True):
            del row[count:]
        if segment.table.exclusive:  # given back, but for 2 % where rows lie side by side
            needed = (-(-segment.table.lengths // PAGE)).tolist()
            assert segment.pool.pages <= max(sum(needed), 1.02 * sum(needed))

    @precondition(lambda self: len(self.live) < 4)
    @rule(data=st.data())
    def select(self, data):
        segment, model = self.pick(data)
        batch = len(model) // HEADS
        chosen = data.draw(
            st.one_of(st.just(list(range(batch))), st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        )
        copy = [list(model[row * HEADS + head]) for row in chosen for head in range(HEADS)]
        before = segment.nbytes
        self.live.append((segment.select(np.array(chosen)), copy))
        assert segment.nbytes == before  # nothing was copied

    @rule(data=st.data())
    def clear(self, data):
        segment, model = self.pick(data)
        segment.clear()
        for row in model:
            row.clear()

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def forget(self, data):
        self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        gc.collect()

    @invariant()
    def holds_what_it_must(self):
        for segment, model in self.live:
            assert segment.counts().reshape(-1).tolist() == [len(row) for row in model]
            assert segment.table.holed or segment.longest == max(map(len, model))
            stored = segment.dense()
            keys, values, valid = (x.flatten(0, 1) for x in (stored.keys, stored.values, stored.valid))
            columns = {name: column.flatten(0, 1) for name, column in stored.columns.items()}
            for i, row in enumerate(model):
                numbers, scores = [n for n, _ in row], [s for _, s in row]
                assert columns[POSITION][i][valid[i]].tolist() == numbers
                assert keys[i][valid[i]].tolist() == [[float(n)] * WIDTH for n in numbers]
                assert values[i][valid[i]].tolist() == [[-float(n)] * WIDTH for n in numbers]
                if "score" in columns:
                    assert columns["score"][i][valid[i]].tolist() == scores
                else:
                    assert not any(scores)
            assert torch.isfinite(keys).all() and torch.isfinite(values).all()  # the slack is read too, masked

    @invariant()
    def counts_are_holders_and_bytes_are_tensors(self):
        pools = {id(segment.pool): segment.pool for segment, _ in self.live}
        self.pools |= pools
        for key, pool in pools.items():
            tables = [segment.table.table for segment, _ in self.live if id(segment.pool) == key]
            held = np.concatenate([table[table >= 0] for table in tables])
            assert np.array_equal(pool.refs, np.bincount(held, minlength=pool.pages))
            assert pool.shared == int((pool.refs > 1).sum()) and pool.used == int((pool.refs > 0).sum())
            assert sorted(pool._free) == np.flatnonzero(pool.refs == 0).tolist()
        for segment, _ in self.live:
            table, pool = segment.table, segment.pool
            tensors = sum(plane.untyped_storage().nbytes() for plane in pool.planes.values())
            arrays = (pool.refs, table.table, table.lengths, table.holes, table.hole_count)
            assert segment.nbytes == tensors + sum(array.nbytes for array in arrays)
            room = (table.table >= 0).sum(1) * PAGE
            assert (table.lengths <= room).all()
            if table.regular:
                expected = np.arange(table.table.size).reshape(table.table.shape)
                assert np.array_equal(table.table, expected)

    def teardown(self):
        for segment, _ in self.live:
            segment.clear()
        gc.collect()
        for pool in self.pools.values():
            assert pool.used == 0 and pool.shared == 0, "pages leak"


TestSegments = pytest.mark.slow(Segments.TestCase)
TestSegments.settings = settings(max_examples=12, stateful_step_count=25, deadline=None)
