"""Busy programs beside a measurement: on a machine that others use, too, threads wait for each other."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOP = """
import select, sys
words, busy = sys.stdin.buffer.raw, False
while True:
    if not busy or select.select([words], [], [], 0)[0]:
        word = words.read(1)
        if not word:
            break
        busy = word == b"1"
    else:
        for _ in range(10**5):
            pass
"""
"""Counts between a 1 and a 0 on its standard input, and ends with that, as when the process that started it ends."""
SETTLE = 0.05
"""Seconds in which a loop has heard what it is told."""


class BusyLoops:
    """Processes that do nothing, or nothing but count."""

    def __init__(self, loops: list[subprocess.Popen[bytes]]):
        self.loops = loops

    def _tell(self, word: bytes) -> None:
        for loop in self.loops:
            assert loop.stdin is not None
            loop.stdin.write(word)
            loop.stdin.flush()
        time.sleep(SETTLE)

    @contextmanager
    def running(self) -> Iterator[None]:
        """They count until the block is over."""
        self._tell(b"1")
        try:
            yield
        finally:
            self._tell(b"0")


@contextmanager
def busy(count: int) -> Iterator[BusyLoops | None]:
    """`count` processes that count when they are asked to, and end with the block; None for none of them."""
    if count < 0:
        raise ValueError(f"beside={count} must be at least 0")
    loops: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            loops.append(subprocess.Popen([sys.executable, "-S", "-c", LOOP], stdin=subprocess.PIPE))
        yield BusyLoops(loops) if loops else None
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()
            if loop.stdin is not None:
                loop.stdin.close()
