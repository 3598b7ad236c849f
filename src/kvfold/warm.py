"""Compiling the CPU kernels before the first request needs them: once, then they come from disk."""

from functools import cache

import torch

from kvfold import ops
from kvfold.formats import POSITION, Chunk, Dense, Spec
from kvfold.ops.cpu import FLOATS, warm

WIDTH = 16
"""A head size that every kernel takes."""


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Compile, or load from disk, the kernels that a model on this device and in this dtype will call."""
    if device.type == "cpu" and dtype in FLOATS:
        _warm_cpu(dtype)


@cache
def _warm_cpu(dtype: torch.dtype) -> None:
    warm(lambda: _work(dtype), f"{str(dtype).removeprefix('torch.')} (once; they are kept on disk)")


def _work(dtype: torch.dtype) -> None:
    """One of everything that decoding and scoring do, on a few tokens in rows of different lengths."""
    states = torch.zeros(1, 2, 40, WIDTH, dtype=dtype)
    q, one = states[:, :, :1], states[:, :, :1]
    _, lse, _ = ops.causal(states, states, states, 1.0, sums=True)
    sums = ops.column_sums(states, states, lse, 1.0, torch.zeros(1, 2, dtype=torch.int64))
    one_each = torch.ones(1, 2, dtype=torch.int64)
    ops.top_mask(sums, one_each)
    ops.most_alike([states], [states], one_each, one_each)
    valid = torch.arange(40) < torch.tensor([40, 9], dtype=torch.int64)[None, :, None]
    columns = {POSITION: torch.zeros(1, 2, 40, dtype=torch.int32), "score": torch.zeros(1, 2, 40, dtype=torch.float32)}
    chunk = Chunk(states, states, valid, columns)
    segment = Dense().open(Spec.of(chunk))
    segment.append(chunk)
    segment.append(chunk, even=True)
    segment.attend(q[:, :, None], 1.0)
    for slack in (True, False):
        segment.step(q[:, :, None], one, one, torch.zeros(1, 1, dtype=torch.int32), 1.0, weights=True)
        held, found = segment.columns()
        segment.keep(held & (torch.arange(segment.longest) != 3), {"score": found["score"] + 1}, slack=slack)
