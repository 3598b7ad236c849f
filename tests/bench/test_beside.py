"""Busy programs beside a measurement: they are there, and gone afterwards, after an error too."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvfold.bench import beside


def children() -> int:
    """Loops of this process: others may run some, too."""
    words = ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "args"]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return found.count("words, busy = sys.stdin.buffer.raw")


def runs(pid: int) -> bool:
    """Whether a program of this number is there and is one of the loops."""
    found = subprocess.run(["ps", "-ww", "-p", str(pid), "-o", "args"], capture_output=True, text=True, check=False)
    return "words, busy = sys.stdin.buffer.raw" in found.stdout


def ticks(pid: int) -> int:
    """Hundredths of a second that a process has worked."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().split()[13:15]))


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_they_count_while_the_block_does(fails):
    before = children()
    try:
        with beside.busy(2) as loops:
            assert children() == before + 2 and loops is not None
            with loops.running():
                start, end = [ticks(loop.pid) for loop in loops.loops], time.monotonic() + 60
                while any(ticks(loop.pid) < then + 10 for loop, then in zip(loops.loops, start, strict=True)):
                    assert time.monotonic() < end  # on however few cores
                    time.sleep(0.05)
            time.sleep(0.5)
            rest = [ticks(loop.pid) for loop in loops.loops]
            time.sleep(0.5)
            assert [ticks(loop.pid) for loop in loops.loops] == rest  # and are still after it
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert children() == before


def test_none_are_none():
    with beside.busy(0) as loops:
        assert loops is None


def test_one_ends_when_its_parent_has():
    words = f"[sys.executable, '-S', '-c', {beside.LOOP!r}]"
    code = f"import subprocess, sys; print(subprocess.Popen({words}, stdin=subprocess.PIPE).pid)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    end = time.monotonic() + 60
    while runs(int(run.stdout)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not runs(int(run.stdout))


def test_fewer_than_none_is_refused():
    with pytest.raises(ValueError, match="beside=-1 must be at least 0"), beside.busy(-1):
        pass
