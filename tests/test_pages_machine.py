"""Segments and page tables against plain lists, through any order of operations, with forks that share pages."""

import gc
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvfold.formats import POSITION, Chunk, Dense, DenseSegment, Spec
from kvfold.ops.dispatch import use
from kvfold.pages import Arena, FastMemory, HostMemory, OutOfPages, PagePool, PageTable, Plane

HEADS, PAGE = 2, 4
Token = tuple[int, float]  # its number, and the column "score" (0 where nobody set one)
CPU = torch.device("cpu")


def check_pools(pools: dict[int, PagePool], tables: list[PageTable]) -> None:
    """Reference counts are those of the holders, and every page is held or free."""
    for key, pool in pools.items():
        held = np.concatenate([table.held for table in tables if id(table.pool) == key])
        assert np.array_equal(pool.refs, np.bincount(held, minlength=pool.pages))
        assert pool.shared == int((pool.refs > 1).sum()) and pool.used == int((pool.refs > 0).sum())
        assert pool.free == int((pool.refs == 0).sum())
        assert all(len(plane) == pool.pages for plane in pool.planes.values())
    for table in tables:
        room = (table.table >= 0).sum(1) * PAGE - table.lengths  # what it takes for granted is there
        assert room.min() >= max(0, table._room)
        assert not (table.pool.arena and (table.regular or table.exclusive))
        if table.regular:
            assert np.array_equal(table.table, np.arange(table.table.size).reshape(table.table.shape))
        for array in (table.table, table.lengths, table.holes, table.hole_count):
            assert not array.flags.writeable and array.flags.owndata


class Segments(RuleBasedStateMachine):
    """`live` holds segments beside what they must contain, one list of tokens for each (sequence, head)."""

    width = 3  # of keys and values: no kernel takes it

    def __init__(self):
        super().__init__()
        self.live: list[tuple[DenseSegment, list[list[Token]]]] = []
        self.pools: dict[int, PagePool] = {}
        self.arena: Arena | None = None
        self.memory: FastMemory | HostMemory | None = None
        self.kernels = ExitStack()
        self.next = 0

    def chunk(self, valid: torch.Tensor, scored: bool) -> tuple[Chunk, list[list[Token]]]:
        b, h, t = valid.shape
        numbers = torch.arange(self.next, self.next + b * h * t, dtype=torch.int32).view(b, h, t)
        self.next += numbers.numel()
        columns = {POSITION: numbers}
        if scored:
            columns["score"] = numbers.float() / 2
        keys = numbers[..., None].expand(b, h, t, self.width).float()
        new = [
            [(n, n / 2 if scored else 0.0) for n in numbers[row, head][valid[row, head]].tolist()]
            for row, head in np.ndindex(b, h)
        ]
        return Chunk(keys, -keys, valid, columns), new

    def pick(self, data) -> tuple[DenseSegment, list[list[Token]]]:
        # By its place: what Hypothesis draws it keeps, and with it the pages.
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    def mask(self, data, shape: tuple[int, ...]) -> torch.Tensor:
        seed, share = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share

    def open(self, batch: int, length: int) -> tuple[DenseSegment, list[list[Token]]]:
        chunk, model = self.chunk(torch.ones(batch, HEADS, length, dtype=torch.bool), scored=False)
        segment = Dense(page_size=PAGE).open(Spec.of(chunk, arena=self.arena, memory=self.memory))
        segment.append(chunk, even=True)
        return segment, model

    @initialize(batch=st.integers(1, 3), length=st.integers(0, 9), arena=st.booleans(), naive=st.booleans())
    def start(self, batch, length, arena, naive):
        """A segment and a fork of it: most of what can go wrong needs two holders."""
        if naive:
            self.kernels.enter_context(use("naive"))
        self.arena = Arena(1 << 20) if arena else None
        segment, model = self.open(batch, length)
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
        if self.arena is not None:  # what it asks for is enough: it can't run out then
            self.arena.check(segment.pages_for(np.full((len(model) // HEADS, HEADS), length)))
            pages = segment.pool.pages
        segment.append(chunk, even=True)
        assert self.arena is None or segment.pool.pages == pages
        for row, more in zip(model, new, strict=True):
            row.extend(more)

    @rule(data=st.data(), rescore=st.booleans(), slack=st.booleans())
    def keep(self, data, rescore, slack):
        segment, model = self.pick(data)
        valid, _ = segment.columns()
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
    def amend(self, data):
        """Write the last token of each row anew."""
        segment, model = self.pick(data)
        valid, _ = segment.columns()
        slots = (
            torch.where(valid, torch.arange(valid.shape[-1]), -1).amax(-1, keepdim=True) if segment.longest else None
        )
        if slots is not None:
            keys = (
                torch.arange(self.next, self.next + slots.numel())
                .view(*slots.shape, 1)
                .expand(*slots.shape, self.width)
            )
            segment.amend(slots, keys.float(), -keys.float())
            segment.amend(slots, None, None)
            positions = segment.columns()[1][POSITION]
            for i, row in enumerate(model):
                if row:
                    row[-1] = (self.next + i, row[-1][1])
                    slot = int(slots.flatten()[i])
                    assert positions.flatten(0, 1)[i, slot] < self.next  # the column stays; the model goes by it
                    segment.table.write(
                        np.array([i]), np.array([slot]), {POSITION: torch.tensor([self.next + i], dtype=torch.int32)}
                    )
            self.next += slots.numel()

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

    @precondition(lambda self: len(self.live) < 4)
    @rule(batch=st.integers(1, 2), length=st.integers(0, 9))
    def another(self, batch, length):
        self.live.append(self.open(batch, length))

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def join(self, data):
        segment, model = self.pick(data)
        other, more = self.live.pop(next(i for i, (x, _) in enumerate(self.live) if x is not segment))
        if len(model) + len(more) <= 8 * HEADS:
            segment.join(other)
            model.extend(more)
            assert not other.longest and not len(other.table.held)
            needed = segment.table.needed
            if segment.table.exclusive and not segment.table.scattered and len(set(needed.tolist())) == 1:
                assert segment.table.regular

    @rule(data=st.data())
    def compact(self, data):
        self.pick(data)[0].compact()

    @rule(data=st.data())
    def restore(self, data):
        """A state is a segment of its own."""
        segment, model = self.pick(data)
        said, tensors = segment.state()
        sizes = len(model) // HEADS, HEADS, self.width, self.width
        spec = Spec(*sizes, torch.float32, CPU, arena=self.arena, memory=self.memory)
        self.live = [(x, y) for x, y in self.live if x is not segment]
        self.live.append((Dense(page_size=PAGE).restore(spec, said, tensors), model))

    @rule(data=st.data())
    def clear(self, data):
        segment, model = self.pick(data)
        segment.clear()
        for row in model:
            row.clear()

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def forget(self, data):
        del self.live[data.draw(st.integers(0, len(self.live) - 1))]

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
                assert keys[i][valid[i]].tolist() == [[float(n)] * self.width for n in numbers]
                assert values[i][valid[i]].tolist() == [[-float(n)] * self.width for n in numbers]
                if "score" in columns:
                    assert columns["score"][i][valid[i]].tolist() == scores
                else:
                    assert not any(scores)
            assert torch.isfinite(keys).all() and torch.isfinite(values).all()  # the slack is read too, masked

    @invariant()
    def counts_are_holders_and_bytes_are_tensors(self):
        pools = {id(segment.pool): segment.pool for segment, _ in self.live}
        self.pools |= pools
        check_pools(pools, [segment.table for segment, _ in self.live])
        for segment, _ in self.live:
            table, pool = segment.table, segment.pool
            tensors = sum(plane.untyped_storage().nbytes() for plane in pool.planes.values()) + pool.refs.nbytes
            if isinstance(self.memory, HostMemory):  # planes have some room behind them
                tensors -= sum(plane.untyped_storage().nbytes() - plane.nbytes for plane in pool.planes.values())
            assert pool.nbytes == tensors == pool.pages * pool.page_nbytes
            if self.arena is not None:
                tensors = len(set(table.held.tolist())) * pool.page_nbytes
                assert self.arena.nbytes == pool.nbytes <= self.arena.capacity
                assert self.arena.used_nbytes == pool.used * pool.page_nbytes
            arrays = (table.table, table.lengths, table.holes, table.hole_count)
            assert segment.nbytes == tensors + sum(array.nbytes for array in arrays)
            assert segment.row_nbytes().sum() == len(table.held) * pool.page_nbytes

    def teardown(self):
        self.kernels.close()
        for segment, _ in self.live:
            segment.clear()
        gc.collect()
        for pool in self.pools.values():
            assert pool.used == 0 and pool.shared == 0, "pages leak"


Page = tuple[float, list[int]]  # what the page has once, and its tokens


class Tables(RuleBasedStateMachine):
    """Page tables whose pages have something of their own, beside the pages that each row must hold, in its order.

    In a tight arena: what finds no room there changes nothing.
    """

    def __init__(self):
        super().__init__()
        self.live: list[tuple[PageTable, list[list[Page]]]] = []
        self.arena: Arena | None = None
        self.next = 0

    def pool(self) -> PagePool:
        planes = {"number": Plane(None, torch.int32), "stamp": Plane(2, torch.float32, per_page=True)}
        return PagePool(planes, CPU, PAGE) if self.arena is None else self.arena.pool("tables", planes, CPU, PAGE)

    @initialize(rows=st.integers(1, 3), pages=st.none() | st.integers(1, 30), scattered=st.booleans())
    def start(self, rows, pages, scattered):
        page = PAGE * 4 + 2 * 4 + 4
        self.arena, self.scattered = None if pages is None else Arena(pages * page), scattered
        self.live = [(PageTable(self.pool(), rows, scattered=scattered), [[] for _ in range(rows)])]

    def pick(self, data) -> tuple[PageTable, list[list[Page]]]:
        # By its place: what Hypothesis draws it keeps, and with it the pages.
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @rule(data=st.data())
    def add(self, data):
        table, model = self.pick(data)
        counts = np.array([data.draw(st.integers(0, 2 * PAGE + 1)) for _ in model])
        numbers = torch.arange(self.next, self.next + int(counts.sum()), dtype=torch.int32)
        held = [sum(len(tokens) for _, tokens in row) for row in model]
        begun = [-(-(old + new) // PAGE) - -(-old // PAGE) for old, new in zip(held, counts.tolist(), strict=True)]
        stamps = torch.arange(self.next, self.next + sum(begun)).float()[:, None].expand(-1, 2)
        wanted = table.pages_for(counts)
        before = table.table, table.lengths, table.pool.used
        try:
            table.add(counts, {"number": numbers, "stamp": stamps})
        except OutOfPages as error:
            assert self.arena is not None and error.needed > error.free and error.capacity == self.arena.capacity
            assert before == (table.table, table.lengths, table.pool.used) and wanted > table.pool.free
            return
        self.next += int(counts.sum()) + 1
        left, marks = numbers.tolist(), stamps[:, 0].tolist()
        for row, count in zip(model, counts.tolist(), strict=True):
            for _ in range(count):
                if not row or len(row[-1][1]) == PAGE:
                    row.append((marks.pop(0), []))
                row[-1][1].append(left.pop(0))

    @rule(data=st.data())
    def cut(self, data):
        table, model = self.pick(data)
        counts = [data.draw(st.integers(0, sum(len(tokens) for _, tokens in row))) for row in model]
        table.cut(np.array(counts))
        table.trim(slack=data.draw(st.booleans()))
        for row, count in zip(model, counts, strict=True):
            row[:] = [(stamp, tokens[: count - i * PAGE]) for i, (stamp, tokens) in enumerate(row) if count > i * PAGE]

    @rule(data=st.data())
    def drop_pages(self, data):
        table, model = self.pick(data)
        gone = np.array(data.draw(st.lists(st.booleans(), min_size=table.table.size, max_size=table.table.size)))
        gone = gone.reshape(table.table.shape).astype(bool)
        for row, marks in zip(model, gone, strict=True):
            marks[len(row) :] = False
            row[:] = [page for i, page in enumerate(row) if not marks[i]]
        table.drop_pages(gone)
        if data.draw(st.booleans()):
            table.trim()
            assert not table.exclusive or table.scattered is False or table.pool.pages == table.needed.sum()

    @precondition(lambda self: len(self.live) < 4)
    @rule(data=st.data())
    def select(self, data):
        table, model = self.pick(data)
        rows = data.draw(st.lists(st.integers(0, len(model) - 1), min_size=1, max_size=3))
        chosen = [[(stamp, list(tokens)) for stamp, tokens in model[row]] for row in rows]
        self.live.append((table.select(np.array(rows)), chosen))

    @precondition(lambda self: len(self.live) < 4)
    @rule(rows=st.integers(1, 2))
    def another(self, rows):
        self.live.append((PageTable(self.pool(), rows, scattered=self.scattered), [[] for _ in range(rows)]))

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def join(self, data):
        table, model = self.pick(data)
        other, more = self.live.pop(next(i for i, (x, _) in enumerate(self.live) if x is not table))
        if len(model) + len(more) <= 8:
            table.join(other)
            model.extend(more)

    @rule(data=st.data())
    def compact(self, data):
        self.pick(data)[0].compact()

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def forget(self, data):
        del self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @invariant()
    def pages_stay_whole(self):
        for table, model in self.live:
            lengths = [sum(len(tokens) for _, tokens in row) for row in model]
            assert table.lengths.tolist() == lengths
            numbers, stamps = table.paged("number"), table.paged("stamp")
            assert numbers.shape == (*table.table.shape, PAGE) and stamps.shape == (*table.table.shape, 2)
            for i, row in enumerate(model):
                for j, (stamp, tokens) in enumerate(row):
                    assert numbers[i, j, : len(tokens)].tolist() == tokens
                    assert stamps[i, j].tolist() == [stamp, stamp]
                assert table.dense("number")[i, : lengths[i]].tolist() == [n for _, tokens in row for n in tokens]

    @invariant()
    def counts_are_holders(self):
        check_pools({id(t.pool): t.pool for t, _ in self.live}, [table for table, _ in self.live])
        assert self.arena is None or self.arena.nbytes <= self.arena.capacity


# As many as a few seconds allow, and others on every run: what one finds is replayed from Hypothesis' own folder.
MANY = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=False)
TestSegments = pytest.mark.slow(Segments.TestCase)
TestSegments.settings = MANY
TestTables = pytest.mark.slow(Tables.TestCase)
TestTables.settings = MANY
