"""Triton kernels in tests, compiled down to a GPU's machine code by Triton's own compiler, which needs no GPU."""

import sys
from typing import Any

import pytest


class Compiler:
    """Compiles every kernel of `kvfold.ops` that would be launched, for a compute capability; none runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int):
        import triton
        from triton.backends.compiler import GPUTarget

        self.made: dict[str, Any] = {}
        monkeypatch.setattr(triton.runtime.driver, "_active", _NoDriver(GPUTarget("cuda", capability, 32)))
        for path, module in list(sys.modules.items()):
            for name, kernel in list(vars(module).items()) if path.startswith("kvfold.ops.") else ():
                # What begins with an underscore is launched; the others are parts of those.
                if name.startswith("_") and isinstance(kernel, triton.JITFunction):
                    monkeypatch.setattr(module, name, _Launched(name, kernel, self.made))


class _Launched:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, name: str, kernel: Any, made: dict[str, Any]):
        self.name, self.kernel, self.made = name, kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.made[self.name] = self.kernel.warmup(*args, grid=grid, **options)

        return launch


class _NoDriver:
    """What the compiler asks of a driver."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
