"""Pages on the host with slots for few of them: the same as in memory, through any order of operations."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from elsewhere import CPU, HEADS, WIDTH, chunk, twins
from kvfold.formats import LOG_MASS, Dense, Fp8, Kivi, Segment, Spec
from kvfold.ops.dispatch import use
from kvfold.pages import HostMemory
from test_pages_machine import Segments

PAGE = 16
LITTLE = 6144
TOKEN = HEADS * (2 * WIDTH + 1) * 4
"""Bytes of a token of all heads: keys, values, positions."""


class HostSegments(Segments):
    """The machine of pages, on the host: two layouts, and slots for three dozen pages or so in both."""

    width = 4  # kernels take it, and they read slots

    @initialize(batch=st.integers(1, 3), length=st.integers(0, 9), naive=st.booleans())
    def start(self, batch, length, naive):
        if naive:
            self.kernels.enter_context(use("naive"))
        self.memory = HostMemory(LITTLE, CPU)
        segment, model = self.open(batch, length)
        fork = segment.select(np.arange(batch))
        self.live = [(segment, model), (fork, [list(row) for row in model])]

    @invariant()
    def no_more_than_the_limit_is_on_the_device(self):
        if self.memory is not None:
            assert self.memory.resident_nbytes <= LITTLE

    @invariant()
    def queries_get_what_is_stored(self):
        """Keys are all alike in a head, so each token counts by its own key: by slots as by the planes themselves."""
        for segment, model in self.live if self.memory is not None else ():
            if not any(model):
                continue
            q = torch.ones(len(model) // 2, 2, 1, 1, self.width)
            got, lse, _ = segment.attend(q, 1e-3)
            chunk = segment.dense()
            logits = (q[:, :, 0] @ chunk.keys.mT * 1e-3).masked_fill(~chunk.valid[:, :, None], -torch.inf)
            torch.testing.assert_close(lse[:, :, 0], logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
            some = chunk.valid.any(-1)
            expected = logits.softmax(-1) @ chunk.values
            torch.testing.assert_close(got[:, :, 0][some], expected[some], atol=1e-3, rtol=1e-4)


TestHostSegments = pytest.mark.slow(HostSegments.TestCase)
TestHostSegments.settings = settings(max_examples=20, stateful_step_count=25, deadline=None, derandomize=False)


def pair(form, limit: int, tokens: int) -> tuple[Segment, Segment, HostMemory]:
    """A segment in memory, and one on the host, of the same tokens."""
    little = HostMemory(limit, CPU)
    return *twins(form, little, tokens), little


def same(there: Segment, here: Segment, atol: float = 1e-5, **options) -> None:
    q = torch.randn(1, HEADS, 2, 1, WIDTH)
    for mine, theirs in zip(there.attend(q, 0.125, **options), here.attend(q, 0.125, **options), strict=True):
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("form", [Dense(), Dense(dtype=torch.float16), Fp8(), Kivi(bits=4, residual=32)], ids=str)
@pytest.mark.parametrize("naive", [False, True])
def test_stretches_answer_as_one(form, naive):
    """3000 tokens of 3 heads are 4.6 MB in float32: an eighth of them has room."""
    here, there, little = pair(form, 600_000, 3000)
    for at in range(3000, 3020):
        for each in (here, there):
            each.append(chunk(1, at, seed=at), even=True)
    read = torch.rand(1, HEADS, 3020) < 0.3
    for options in ({}, {"weights": True}, {"read": read}):
        if naive:
            with use("naive"):
                same(there, here, 3e-4 if isinstance(form, Kivi) else 1e-5, **options)
        else:
            same(there, here, 3e-4 if isinstance(form, Kivi) else 1e-5, **options)
    assert torch.equal(there.dense().keys, here.dense().keys)
    assert little.resident_nbytes <= 600_000 and little.misses


def test_a_token_goes_down_once_and_what_has_room_comes_up_never():
    here, there, little = pair(Dense(), 8 << 20, 1000)
    assert little.written_nbytes == 1000 * TOKEN and little.brought_nbytes == 0
    same(there, here)
    there.append(chunk(1, 1000), even=True)
    here.append(chunk(1, 1000), even=True)
    same(there, here)
    assert little.written_nbytes == 1001 * TOKEN and little.brought_nbytes == 0 and little.resident_nbytes <= 8 << 20


def test_what_must_go_is_not_copied_back_and_comes_again():
    """Reading far more than has room moves pages up alone, whole ones, with all their planes."""
    here, there, little = pair(Dense(), 600_000, 3000)
    written = little.written_nbytes
    misses, brought = little.misses, little.brought_nbytes
    for _ in range(3):
        same(there, here)
    assert little.written_nbytes == written == 3000 * TOKEN
    page = PAGE * TOKEN // HEADS
    assert little.brought_nbytes - brought == (little.misses - misses) * page > 0


@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_is_written_over_is_read_so(what):
    """The device holds the page already: one plane of it is old, and that alone is brought."""
    here, there, little = pair(Dense(), 8 << 20, 100)
    same(there, here)
    slots, new = torch.full((1, HEADS, 1), 50), torch.randn(1, HEADS, 1, WIDTH)
    for each in (here, there):
        each.amend(slots, **{"keys": None, "values": None, what: new})
    same(there, here)
    assert little.brought_nbytes == HEADS * PAGE * WIDTH * 4


def test_a_new_column_comes_with_its_pages():
    here, there, little = pair(Dense(), 8 << 20, 100)
    masses = torch.rand(1, HEADS, 100)
    for each in (here, there):
        each.keep(torch.ones(1, HEADS, 100, dtype=torch.bool), {LOG_MASS: masses})
    same(there, here)
    assert little.resident_nbytes <= 8 << 20
    same(there.select(np.zeros(2, dtype=np.int64)).select(np.array([1])), here)


def test_a_mask_brings_the_pages_that_it_reads():
    _, there, little = pair(Dense(), 600_000, 3000)
    before, read = little.brought_nbytes, torch.zeros(1, HEADS, 3000, dtype=torch.bool)
    read[..., 5:40] = True
    there.attend(torch.randn(1, HEADS, 2, 1, WIDTH), 0.125, read=read)
    assert little.brought_nbytes - before <= HEADS * 3 * PAGE * TOKEN // HEADS


def test_what_is_fetched_ahead_is_a_miss_and_then_no_copy():
    here, there, little = pair(Dense(), 2 << 20, 2000)  # a pool of its own has no room beside another
    other = Dense().open(Spec(1, HEADS, WIDTH, WIDTH, torch.float32, CPU, memory=little))
    other.append(chunk(1200), even=True)
    same(there, here)
    other.attend(torch.randn(1, HEADS, 2, 1, WIDTH), 0.125)
    hits, misses, before = little.hits, little.misses, little.brought_nbytes
    little.fetch(there.pool)
    brought, missed = little.brought_nbytes - before, little.misses - misses
    assert brought == missed * PAGE * TOKEN // HEADS > 0 and little.hits == hits
    assert little.resident_nbytes <= 2 << 20
    same(there, here)


def test_a_choice_is_not_fetched_ahead():
    """Another query chooses others: only what is surely read comes before it is asked for."""
    _, there, little = pair(Dense(), 600_000, 3000)
    read = torch.zeros(1, HEADS, 3000, dtype=torch.bool)
    read[..., :40] = True
    there.attend(torch.randn(1, HEADS, 2, 1, WIDTH), 0.125, read=read)
    before = little.brought_nbytes
    little.fetch(there.pool)
    assert little.brought_nbytes == before


def test_what_stands_beside_takes_slots():
    class Owner:
        pass

    here, there, little = pair(Dense(), 1 << 20, 1000)
    owner = Owner()
    little.hold(owner, 600_000)
    assert little.resident_nbytes <= 1 << 20 and little.beside_nbytes == 600_000
    same(there, here)
    little.hold(owner, (1 << 20) - 1000)
    assert little.resident_nbytes <= 1 << 20
    with pytest.raises(ValueError, match=r"fast_memory=1048576 is too little: .* are read at once, and 0 have room"):
        there.attend(torch.randn(1, HEADS, 2, 1, WIDTH), 0.125)
    little.hold(owner, 0)


def test_pools_that_are_gone_leave_their_slots():
    here, there, little = pair(Dense(), 1 << 20, 500)
    for at in range(40):  # far more pages in all than there are numbers for at once
        other = Dense().open(Spec(1, HEADS, WIDTH, WIDTH, torch.float32, CPU, memory=little))
        other.append(chunk(300, seed=at), even=True)
        other.attend(torch.randn(1, HEADS, 2, 1, WIDTH), 0.125)
        del other
        gc.collect()
    same(there, here)
    assert little.slow_nbytes == there.pool.nbytes - there.pool.refs.nbytes
