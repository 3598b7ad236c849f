"""Triton kernels in tests: on a GPU where there is one, else in Triton's interpreter."""

import sys
from collections.abc import Iterator

import pytest
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


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
