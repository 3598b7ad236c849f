"""One dispatch for all operations."""

import os
import subprocess
import sys

import pytest
import torch

from kvfold import ops
from kvfold.ops import dispatch


@pytest.fixture
def toy(monkeypatch):
    """An operation with three versions, gone after the test."""
    monkeypatch.setattr(dispatch, "_kernels", {"toy": [], "other": []})
    monkeypatch.setattr(dispatch, "_forced", [])
    dispatch.register("toy", "naive", rank=0)(lambda: "naive")
    dispatch.register("toy", "fast", rank=20, fits=lambda x: x.dtype == torch.float32)(lambda: "fast")
    dispatch.register("toy", "middle", rank=10, fits=lambda x: x.dtype != torch.float16)(lambda: "middle")
    dispatch.register("other", "special", rank=5)(lambda: "special")
    return lambda dtype=torch.float32: dispatch.select("toy", torch.zeros(1, dtype=dtype))()


def test_the_fastest_version_that_fits(toy):
    assert dispatch.versions("toy") == ["fast", "middle", "naive"]
    assert [toy(), toy(torch.bfloat16), toy(torch.float16)] == ["fast", "middle", "naive"]


def test_use_forces_a_version_where_it_fits_and_ends_with_its_block(toy):
    with dispatch.use("middle"):
        assert [toy(), toy(torch.float16)] == ["middle", "naive"]
        with dispatch.use("naive"):
            assert toy() == "naive"
        with dispatch.use("special"):  # a version of another operation
            assert toy() == "naive"
        assert toy() == "middle"
    with pytest.raises(KeyError, match="x"), dispatch.use("middle"):
        raise KeyError("x")
    assert toy() == "fast"


def test_names_that_do_not_exist(toy):
    with dispatch.use("fsat"), pytest.raises(ValueError, match=r"'fsat'.*'fast', 'middle', 'naive', 'special'"):
        toy()
    for ask in (lambda: dispatch.versions("tyo"), lambda: dispatch.select("tyo", torch.zeros(1))):
        for _ in range(2):  # asking must not make it known
            with pytest.raises(KeyError, match=r"'tyo' is unknown; there are \['other', 'toy'\]"):
                ask()


def test_every_operation_has_its_definition_last():
    pages = ("attend_pages", "append_pages", "keep_pages")
    for op in ("attend", "causal", "column_sums", "window_attention", "most_alike", *pages):
        assert dispatch.versions(op)[-1] == "naive"


def test_the_environment_variable_forces_a_version():
    script = """
import torch
from kvfold import ops
from kvfold.ops import dispatch
with dispatch.use("naive"):
    ops.attend(*[torch.zeros(1, 1, 1, 8)] * 3, 1.0)
try:
    ops.attend(*[torch.zeros(1, 1, 1, 8)] * 3, 1.0)
except ValueError as error:
    print(error)
"""
    env = os.environ | {"KVFOLD_KERNELS": "typo"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("kernels='typo' (use() or KVFOLD_KERNELS) must be one of")


def test_tensors_that_need_a_gradient_take_the_definition():
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    k = torch.randn(1, 1, 5, 8)
    ops.attend(q, k, k, 0.3)[0].sum().backward()
    assert q.grad is not None and (q.grad != 0).any()
