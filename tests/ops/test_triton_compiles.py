"""The Triton kernels become machine code, in a process of its own: what the interpreter changes in Triton stays so."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (the extra `gpu`)")

KERNELS = Path(__file__).with_name("compiled_kernels.py")


@pytest.mark.slow
def test_kernels_become_machine_code():
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"python_files={KERNELS.name}",
        "-o", "addopts=--strict-markers --strict-config", str(KERNELS),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=KERNELS.parents[2])
    assert done.returncode == 0 and "passed" in done.stdout + "skipped", done.stdout[-4000:]
