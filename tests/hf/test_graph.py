"""What a decode graph refuses, before it touches CUDA. What it replays: tests/ops/test_gpu_glue.py, test_cuda.py."""

import pytest

import kvfold
from kvfold.hf.graph import decode_graph
from models import build


def test_only_on_cuda():
    model = build("llama")
    cache = kvfold.Cache(model)
    with pytest.raises(ValueError, match=r"model on cpu: a decode graph needs CUDA"), decode_graph(model, cache):
        pass
    assert "forward" not in vars(model)
