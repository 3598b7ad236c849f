"""Busy programs beside a measurement: they are there, and gone afterwards, after an error too."""

import subprocess
import sys
import time

import pytest

from kvfold.bench import beside
from kvfold.bench.machine import Elsewhere


def children() -> int:
    found = subprocess.run(["ps", "-eww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    return found.count("os.getppid() == int(sys.argv[1])")


@pytest.mark.parametrize("fails", [False, True])
def test_they_run_while_the_block_does(fails):
    before, others = children(), Elsewhere()
    try:
        with beside.busy(2):
            assert children() == before + 2
            time.sleep(0.5)
            found = others.cores()
            assert found is None or found > 0.2  # on however few cores
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert children() == before


def test_one_ends_when_its_parent_has():
    code = (
        f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {beside.LOOP!r}, str(os.getpid())])"
    )
    before = children()
    subprocess.run([sys.executable, "-c", code], check=True)
    end = time.monotonic() + 60
    while children() > before and time.monotonic() < end:
        time.sleep(0.1)
    assert children() == before


def test_fewer_than_none_is_refused():
    with pytest.raises(ValueError, match="beside=-1 must be at least 0"), beside.busy(-1):
        pass
