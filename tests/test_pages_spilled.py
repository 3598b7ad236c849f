"""Pages in a file with little of them in memory: the same segments, through any order of operations and files."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from kvfold.files import nameless
from kvfold.pages import FastMemory, SpillFile
from kvfold.pages.spill import UNIT
from test_pages_machine import Segments

CPU = torch.device("cpu")


def memory(nbytes: int, folder: Path) -> FastMemory:
    return FastMemory(nbytes, SpillFile(nameless(folder), str(folder)))


class SpilledSegments(Segments):
    """The machine of pages, with room for 6 blocks: every plane of a segment has one of its own at least."""

    @initialize(batch=st.integers(1, 3), length=st.integers(0, 9))
    def start(self, batch, length):
        self.memory = memory(6 * UNIT, Path("/dev/shm") if os.path.isdir("/dev/shm") else Path())
        segment, model = self.open(batch, length)
        fork = segment.select(np.arange(batch))
        self.live = [(segment, model), (fork, [list(row) for row in model])]

    @invariant()
    def no_more_than_the_limit_is_in_memory(self):
        if self.memory is not None:
            assert self.memory.residency.resident_nbytes <= self.memory.residency.capacity * UNIT == 6 * UNIT


TestSpilledSegments = pytest.mark.slow(SpilledSegments.TestCase)
TestSpilledSegments.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=False)
