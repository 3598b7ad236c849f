"""The kernels' threads: as many as are granted, none that a caller waits for before it begins, none lost by a fork."""

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from kvfold import ops
from kvfold.ops import _cpu, cpu, dispatch


def work(seed: int = 0, threads: int = 2) -> torch.Tensor:
    """Attention over enough tokens that several threads share it."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, 300, 32, generator=rng) for _ in range(3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with dispatch.use("cpu"):
            return ops.causal(q, k, v, 0.2)[0]
    finally:
        torch.set_num_threads(before)


NUMBERS = np.arange(1 << 18, dtype=np.float32) % 7
TOTAL = float(NUMBERS.sum(dtype=np.float64))


def in_child(pipe) -> None:
    """Kernels alone: torch's own threads (libgomp's) are lost in a child, and it waits for them."""
    pipe.send((_cpu.read(NUMBERS, 2), _cpu.workers()))
    pipe.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # that is what is tested
def test_a_forked_child_works_as_its_parent_does():
    assert _cpu.read(NUMBERS, 3) == TOTAL and _cpu.workers() >= 2
    mine, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=in_child, args=(theirs,))
    child.start()
    try:
        assert mine.poll(60), "the child waits for threads that it does not have"
        assert mine.recv() == (TOTAL, 1)
    finally:
        child.join(10)
        child.kill()
    assert _cpu.read(NUMBERS, 3) == TOTAL


def test_several_callers_at_once():
    want, got = [work(seed) for seed in range(4)], [[] for _ in range(4)]

    def caller(seed: int) -> None:
        got[seed].extend(work(seed, threads=3) for _ in range(10))

    callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(120)
    assert all(len(found) == 10 and all(torch.equal(x, want[seed]) for x in found) for seed, found in enumerate(got))


def test_more_threads_than_cores_change_nothing():
    assert {_cpu.read(NUMBERS, threads) for threads in (1, 2, 5, 33)} == {TOTAL}


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({"cpu.max": "gibberish\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_a_containers_quota_is_read(tmp_path: Path, files: dict[str, str], granted: float):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu.quota(tmp_path) == granted


def test_no_more_threads_than_are_granted(monkeypatch):
    monkeypatch.setattr(cpu, "granted", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert cpu.threads() == 1


WITHOUT = """
import sys
sys.modules["kvfold.ops._cpu"] = None  # as where no compiler was
import torch
from kvfold import ops
from kvfold.ops import dispatch
q, k, v = (torch.randn(2, 2, 20, 16) for _ in range(3))
out = ops.causal(q, k, v, 0.25, sums=True)[0]
with dispatch.use("naive"):
    torch.testing.assert_close(out, ops.causal(q, k, v, 0.25)[0])
chosen = ops.top_mask(torch.rand(1, 2, 9), torch.full((1, 2), 3))
assert chosen.sum(-1).tolist() == [[3, 3]]
print("well")
"""


def test_without_the_compiled_kernels_torch_does_it_and_that_is_said_once():
    found = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and found.stdout == "well\n", found.stderr
    assert found.stderr.count("the CPU kernels are not there") == 1


def test_a_narrower_set_can_be_asked_for():
    command = [sys.executable, "-c", "from kvfold.ops import _cpu; print(_cpu.names())"]
    env = os.environ | {"KVFOLD_ISA": "baseline"}
    assert subprocess.run(command, capture_output=True, text=True, env=env).stdout == "['baseline']\n"
    refused = subprocess.run(command, capture_output=True, text=True, env=env | {"KVFOLD_ISA": "avx1024"})
    assert refused.returncode != 0 and "instruction set avx1024" in refused.stderr and "baseline" in refused.stderr


def attend(**changed) -> None:
    table = dict(table=np.zeros((1, 1), np.int32), lengths=np.full(1, 3, np.int32))
    holes = dict(holes=np.zeros((1, 0), np.int32), hole_count=np.zeros(1, np.int32))
    states = dict(q=np.zeros((1, 1, 16), np.float32), keys=np.zeros((16, 16), np.float32), mass=None, read=None)
    out = dict(out=np.zeros((1, 1, 16), np.float32), lse=np.zeros((1, 1), np.float32), weights=None)
    options = states | dict(values=states["keys"]) | table | holes | dict(page_size=16, scale=1.0, threads=1) | out
    _cpu.attend(**(options | changed))


@pytest.mark.parametrize(
    "changed",
    [
        dict(table=np.full((1, 1), 7, np.int32)),
        dict(table=np.full((1, 1), -1, np.int32)),
        dict(lengths=np.full(1, 17, np.int32)),
        dict(lengths=np.full(1, -1, np.int32)),
        dict(lengths=np.full(2, 3, np.int32)),
        dict(page_size=3),
        dict(q=np.zeros((2, 1, 16), np.float32)),
        dict(q=np.zeros((1, 1, 8), np.float32)),
        dict(read=np.ones((1, 2), bool)),
        dict(mass=np.zeros((2, 1), np.float32)),
        dict(weights=np.zeros((1, 1, 2), np.float32)),
        dict(keys=np.zeros((16, 16), np.int16)[:, :8].copy()),
        dict(hole_count=np.full(1, 1, np.int32)),
        dict(hole_count=np.full(1, -1, np.int32)),
        dict(q=np.zeros((1, 1, 0), np.float32), keys=np.zeros((16, 0), np.float32)),
    ],
)
def test_what_does_not_fit_together_is_refused_before_it_is_read(changed):
    attend()
    with pytest.raises(ValueError):
        attend(**changed)


def test_arrays_of_another_type_are_refused():
    with pytest.raises(TypeError):
        attend(lse=np.zeros((1, 1)))


SCARCE = """
import resource
import numpy as np
from kvfold.ops import _cpu
scores, count, chosen = np.zeros((2, 1 << 23), np.float32), np.full(2, 5), np.zeros((2, 1 << 23), bool)
_cpu.read(scores.reshape(-1), 3)  # workers are there
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), -1))
for _ in range(3):
    try:
        _cpu.top_mask(scores, count, chosen, 2)
    except MemoryError:
        print("refused")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
_cpu.top_mask(scores, count, chosen, 2)
print(chosen.sum(1).tolist())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set as Linux has them")
def test_memory_that_is_not_there_is_an_error_and_no_end():
    found = subprocess.run([sys.executable, "-c", SCARCE], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0 and found.stdout == "refused\nrefused\nrefused\n[5, 5]\n", found.stderr


ENDING = """
import threading, time
import numpy as np
from kvfold.ops import _cpu
x = np.ones(1 << 20, np.float32)
def go():
    while True:
        _cpu.read(x, 2)
for _ in range(2):
    threading.Thread(target=go, daemon=True).start()
time.sleep(0.3)
"""


def test_a_process_ends_while_daemon_threads_are_in_kernels():
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr
