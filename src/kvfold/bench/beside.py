"""Busy programs beside a measurement: on a machine that others use, too, threads wait for each other."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6):\n        pass\n"
"""Counts, and ends when the process that it is told of, which started it, has ended."""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that do nothing but count, until the block is over."""
    if count < 0:
        raise ValueError(f"beside={count} must be at least 0")
    loops: list[subprocess.Popen[bytes]] = []
    try:
        loops.extend(subprocess.Popen([sys.executable, "-S", "-c", LOOP, str(os.getpid())]) for _ in range(count))
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()
