"""One dispatch for all operations: the fastest version registered for a device and dtype, the naive one otherwise."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """One version of an operation. `fits` sees the leading tensor; versions are tried by descending `rank`."""

    name: str
    rank: int
    run: Callable[..., Any]
    fits: Callable[[Tensor], bool]


_kernels: dict[str, list[Kernel]] = defaultdict(list)
_forced: list[str] = [os.environ["KVFOLD_KERNELS"]] if os.environ.get("KVFOLD_KERNELS") else []


def register(op: str, name: str, *, rank: int, fits: Callable[[Tensor], bool] = lambda _: True) -> Callable[[F], F]:
    """Add a version of `op` (decorator); a higher rank is tried first."""

    def add(run: F) -> F:
        _kernels[op].append(Kernel(name, rank, run, fits))
        _kernels[op].sort(key=lambda kernel: -kernel.rank)
        return run

    return add


def select(op: str, tensor: Tensor) -> Callable[..., Any]:
    """The version of `op` for this tensor's device and dtype."""
    kernels = _kernels[op] if op in _kernels else _known(op)
    for kernel in kernels:
        if kernel.fits(tensor) and (not _forced or kernel.name == _forced[-1]):
            return kernel.run
    names = {kernel.name for others in _kernels.values() for kernel in others}
    if _forced and _forced[-1] not in names:
        raise ValueError(f"kernels={_forced[-1]!r} (use() or KVFOLD_KERNELS) must be one of {sorted(names)}")
    return kernels[-1].run


def versions(op: str) -> list[str]:
    """Names of the versions of `op`, fastest first."""
    return [kernel.name for kernel in _known(op)]


def _known(op: str) -> list[Kernel]:
    if op not in _kernels:
        raise KeyError(f"op={op!r} is unknown; there are {sorted(_kernels)}")
    return _kernels[op]


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block every operation runs its version `name` where it has one that fits, else the naive one."""
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
