"""What is compiled beforehand is what decoding calls: an array of another kind would be compiled for later."""

import logging

import numba
import numpy as np
import pytest
import torch

from kvfold.formats import LOG_MASS, POSITION, Chunk, Dense, Spec
from kvfold.ops.cpu import warm
from kvfold.ops.paged import cpu_kernels
from kvfold.warm import warm_up


def signatures() -> dict[str, set[str]]:
    kernels = ("write", "write_one", "step", "attend", "close_gaps", "punch_holes")
    return {name: set(map(str, getattr(cpu_kernels, name).signatures)) for name in kernels}


def test_decoding_compiles_nothing_after_warming_up():
    warm_up(torch.device("cpu"), torch.float32)
    before = signatures()
    assert all(before.values())
    valid = torch.arange(40) < torch.tensor([[40, 9]] * 2)[..., None]
    states = torch.randn(2, 2, 2, 40, 32)
    columns = {POSITION: torch.arange(40, dtype=torch.int32).expand(2, 2, 40), LOG_MASS: torch.zeros(2, 2, 40)}
    chunk = Chunk(*states, valid, columns)
    segment = Dense().open(Spec.of(chunk))
    segment.append(chunk)
    fork = segment.select(np.arange(2))
    for x in (segment, fork, segment.select(np.array([1, 1]))):
        for step in range(3):
            q, at = torch.randn(2, 2, 3, 1, 32), torch.full((2, 1), 50 + step, dtype=torch.int32)
            x.step(q, *states[:, :, :, :1], at, 0.3, weights=step == 1)
            held, found = x.columns()
            x.keep(held & (torch.arange(x.longest) != 3), {LOG_MASS: found[LOG_MASS] + 1}, slack=step < 2)
            x.append(chunk, even=True)
            x.attend(q, 0.3, read=x.columns()[0])
    assert signatures() == before


def test_what_is_compiled_is_said_and_nothing_else(caplog: pytest.LogCaptureFixture):
    """However long it takes: a busy machine reads kernels from disk as slowly as a quick one compiles them."""
    first, second = (numba.njit(lambda x: x + 1) for _ in range(2))
    with caplog.at_level(logging.WARNING, "kvfold"):
        warm(lambda: (first(1), second(1)), "these")
        assert [record.getMessage() for record in caplog.records] == ["compiling the CPU kernels for these"]
        caplog.clear()
        warm(lambda: (first(2), second(2)), "these")
        assert not caplog.records
