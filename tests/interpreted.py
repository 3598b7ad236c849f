"""Triton kernels in tests: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kvfold.ops import dispatch
from kvfold.pages import PageTable

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Of outputs of about 1, by the dtype of queries: what is between is float32, but for the end of products on a GPU."""


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[None]:
    """Every kernel of `kvfold.ops` that is imported runs in the interpreter, unless there is a GPU."""
    if not ON_GPU:
        _interpret(monkeypatch)
    yield


def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, tl

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # The variable alone decides at import, and another test may have imported Triton (transformers does).
    ours = [module for name, module in sys.modules.items() if name.startswith("kvfold.ops.")]
    for module in (tl, tl.standard, *ours):
        for name, kernel in list(vars(module).items()):
            if isinstance(kernel, triton.JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(kernel.fn))

    def create_dot(self, a, b, *rest):
        # The interpreter multiplies the bits of bfloat16 as integers (3.9), so they become float32 first.
        wide = [self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return dot(self, *wide, *rest)

    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def triton_fits(monkeypatch) -> None:
    """Let the dispatch take the Triton versions on the CPU too."""
    wanted = {
        op: [dataclasses.replace(k, fits=lambda _: True) if k.name == "triton" else k for k in kernels]
        for op, kernels in dispatch._kernels.items()
    }
    monkeypatch.setattr(dispatch, "_kernels", wanted)


def on_device(table: PageTable) -> PageTable:
    """A table whose pages lie where kernels run."""
    table.pool.device = torch.device(DEVICE)
    for name, plane in table.pool.planes.items():
        table.pool.planes[name] = plane.to(DEVICE)
    return table


def agree(got: tuple[Tensor, ...], want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """(out, lse, weights) of `attend_pages` for queries of a dtype, and of `softmax_over` for them one by one."""
    assert [x.dtype for x in got] == [dtype, torch.float32, torch.float32]
    for name, mine, theirs, off in zip(
        ("out", "lse", "weights"), got, want, (TOLERANCE[dtype], 1e-5, 1e-5), strict=True
    ):
        mine, theirs = mine.cpu().double().reshape(theirs.shape), theirs.double().nan_to_num(0.0, neginf=-torch.inf)
        assert_close(mine, theirs, atol=off, rtol=off, msg=lambda text, name=name: f"{name}: {text}")
