"""Attention a block at a time: no copy of all keys or values is ever there."""

import pytest
import torch
from format_cases import FORMATS, B, D, G, H, chunk, opened
from torch.utils._python_dispatch import TorchDispatchMode

from kvfold.ops import dispatch
from kvfold.ops.attend import blocked


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation makes; looking at what is `stored` makes none."""

    def __init__(self, stored):
        super().__init__()
        self.stored, self.numbers = {x.untyped_storage().data_ptr() for x in stored}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.stored:
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("name", ["balanced", "depth", "fp8", "kivi", "rotated", "sparse", "uneven"])
def test_attention_works_out_a_few_tokens_at_a_time(name, monkeypatch):
    segment = opened(FORMATS[name], chunk(700))
    q = torch.randn(B, H, G, 1, D)
    want = segment.attend(q, 0.3)[0]
    stored = [plane for part in getattr(segment, "parts", [segment]) for plane in part.pool.planes.values()]
    monkeypatch.setattr(blocked, "BLOCK_ELEMENTS", 40 * B * H * D)
    with dispatch.use("naive"), Largest(stored) as seen:
        out = segment.attend(q, 0.3)[0]
    assert 0 < seen.numbers <= max(40 * B * H * D, 700 * B * H)  # which slots are tokens is there at once
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
