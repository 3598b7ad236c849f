"""Any format through any order of operations, beside the positions of the tokens that each row must hold."""

import numpy as np
import pytest
import torch
from format_cases import FORMATS, KNOWN, D, G, H, chunk, mask_for, reachable, softmax
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.testing import assert_close

from kvfold.formats import POSITION, Kivi, Segment, Spec
from kvfold.pages import Arena

CPU = torch.device("cpu")


class Formats(RuleBasedStateMachine):
    """`live` holds segments of one format beside the positions of each (sequence, head)."""

    def __init__(self):
        super().__init__()
        self.live: list[tuple[Segment, list[list[int]]]] = []
        self.seed = 0

    def pick(self, data) -> tuple[Segment, list[list[int]]]:
        return self.live[data.draw(st.integers(0, len(self.live) - 1))]

    def spec(self, rows: int) -> Spec:
        return Spec(rows, H, D, 8, torch.float32, CPU, artefact=KNOWN, arena=self.arena)

    @initialize(name=st.sampled_from(sorted(FORMATS)), rows=st.integers(1, 3), arena=st.booleans())
    def start(self, name, rows, arena):
        self.form, self.arena = FORMATS[name], Arena(1 << 22) if arena else None
        segment = self.form.open(self.spec(rows))
        self.live = [(segment, [[] for _ in range(rows * H)])]

    @rule(data=st.data(), even=st.booleans())
    def append(self, data, even):
        segment, model = self.pick(data)
        lengths = [data.draw(st.integers(0, 23)) for _ in model]
        lengths = [lengths[0]] * len(model) if even else lengths
        self.seed += 1
        new = chunk(np.reshape(lengths, (-1, H)).tolist(), self.seed, start=100 * self.seed, mass=self.seed % 3 > 0)
        segment.append(new, even=even)
        for row, count in zip(model, lengths, strict=True):
            row += range(100 * self.seed, 100 * self.seed + count)

    @rule(data=st.data(), share=st.sampled_from([0.0, 0.5, 0.95, 1.0]), slack=st.booleans(), noted=st.booleans())
    def keep(self, data, share, slack, noted):
        segment, model = self.pick(data)
        self.seed += 1
        valid, mask = segment.columns()[0].flatten(0, 1), mask_for(self.form, segment, self.seed, share)
        segment.keep(mask, {"score": torch.rand(mask.shape)} if noted else {}, slack=slack)
        for row, here, marks in zip(model, valid, mask.flatten(0, 1), strict=True):
            row[:] = [n for n, stays in zip(row, marks[here].tolist(), strict=True) if stays]

    @rule(data=st.data(), slack=st.booleans())
    def truncate(self, data, slack):
        segment, model = self.pick(data)
        counts = [data.draw(st.integers(0, len(row) + 1)) for row in model]
        segment.truncate(np.reshape(counts, (-1, H)), slack=slack)
        for row, count in zip(model, counts, strict=True):
            del row[count:]

    @precondition(lambda self: len(self.live) < 4)
    @rule(data=st.data())
    def select(self, data):
        segment, model = self.pick(data)
        rows = data.draw(st.lists(st.integers(0, len(model) // H - 1), min_size=1, max_size=3))
        chosen = [list(model[row * H + head]) for row in rows for head in range(H)]
        self.live.append((segment.select(np.array(rows)), chosen))

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def join(self, data):
        segment, model = self.pick(data)
        other, more = self.live.pop(next(i for i, (x, _) in enumerate(self.live) if x is not segment))
        if len(model) + len(more) <= 6 * H:
            segment.join(other)
            model += more

    @rule(data=st.data())
    def restore(self, data):
        segment, model = self.pick(data)
        again = self.form.restore(self.spec(len(model) // H), *segment.state())
        self.live = [(x, y) for x, y in self.live if x is not segment]
        self.live.append((again, model))

    @rule(data=st.data())
    def clear(self, data):
        segment, model = self.pick(data)
        segment.clear()
        segment.compact()
        for row in model:
            row.clear()

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def forget(self, data):
        del self.live[data.draw(st.integers(0, len(self.live) - 1))]

    @invariant()
    def holds_what_it_must(self):
        for segment, model in self.live:
            tokens = segment.dense()
            assert segment.counts().reshape(-1).tolist() == [len(row) for row in model]
            valid, positions = (x.flatten(0, 1) for x in (tokens.valid, tokens.columns[POSITION]))
            assert [places[here].tolist() for places, here in zip(positions, valid, strict=True)] == model
            assert tokens.keys.isfinite().all() and tokens.values.isfinite().all()
            if isinstance(self.form, Kivi):
                assert not (segment.coded.counts() % self.form.group).any()

    @invariant()
    def answers_what_it_holds(self):
        for segment, model in self.live[:2]:
            q = torch.randn(len(model) // H, H, G, 1, D, generator=torch.Generator().manual_seed(self.seed))
            out, lse, _ = segment.attend(q, 0.3)
            want, norm, _ = softmax(segment, q, 0.3)
            assert_close((out, lse), (want, norm), atol=3e-5, rtol=1e-5)

    @invariant()
    def counts_every_byte(self):
        segments = [segment for segment, _ in self.live]
        if self.arena is None:
            counted: set[int] = set()
            assert sum(x.bytes_beside(counted) for x in segments) == reachable(segments)
            return
        assert self.arena.used_nbytes <= self.arena.nbytes == reachable(self.arena) <= self.arena.capacity
        held = [x.row_nbytes().sum() for x in segments]
        assert self.arena.used_nbytes <= sum(held)


TestFormats = pytest.mark.slow(Formats.TestCase)
TestFormats.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=False)
