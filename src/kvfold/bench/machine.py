"""The machine that a benchmark ran on: what it is, how fast it reads memory, what else it did, and a clock for it."""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kvfold.evaluation.decoding import sync
from kvfold.ops.cpu import library, threads
from kvfold.pages.memory import huge_pages

READ_BYTES = {"cpu": 2**29, "cuda": 2**31}
"""Bytes of one plain read: far beyond any cache, and on CUDA long beside a launch."""


@dataclass(frozen=True)
class Spread:
    """Several measurements of the same thing: seconds, or ratios."""

    median: float
    min: float
    max: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def spread(seconds: list[float]) -> Spread:
    """Median and extremes of at least one measurement."""
    return Spread(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, all that it launched included."""
    sync(device)
    start = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - start


class ReadRate:
    """The read bandwidth that the machine shows between the rounds of a benchmark.

    `sample` reads the same float32 array once with a torch sum and, on a CPU, once with kvfold's own vectors. The
    faster reader by its median is the bandwidth: neighbours on a shared machine slow it as they slow what is measured.
    """

    def __init__(self, device: torch.device, nbytes: int | None = None):
        self.device = device
        numbers = (nbytes or READ_BYTES.get(device.type, 2**29)) // 4
        self.data = torch.ones(max(1, numbers // 2**15) * 2**15, device=device, dtype=torch.float32)
        self.readers: dict[str, Callable[[], object]] = {"torch sum": self.data.sum}
        kernels = library() if device.type == "cpu" else None
        if kernels is not None:
            array = self.data.numpy()
            self.readers["kvfold's plain read"] = lambda: kernels.read(array, threads())
        self.seconds: dict[str, list[float]] = {name: [] for name in self.readers}
        for read in self.readers.values():
            timed(read, device)  # pages come in, workers start

    def sample(self, count: int = 1) -> None:
        """`count` reads by each reader, in turns."""
        for _ in range(count):
            for name, read in self.readers.items():
                self.seconds[name].append(timed(read, self.device))

    @property
    def bytes_per_second(self) -> float:
        """The faster reader's, by medians."""
        return self.data.nbytes / min(statistics.median(taken) for taken in self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        readers = {
            name: {"bytes_per_second": self.data.nbytes / statistics.median(taken), **spread(taken).to_dict()}
            for name, taken in self.seconds.items()
        }
        return {"bytes_per_second": self.bytes_per_second, "bytes": self.data.nbytes, "readers": readers}


class Elsewhere:
    """Cores' worth of work of other programs since this was made: well above 0, the seconds are worth little."""

    def __init__(self) -> None:
        self.then = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy - own.user - own.system - own.children_user - own.children_system

    def cores(self) -> float | None:
        """None where the system does not tell (no /proc)."""
        now = self._now()
        if self.then is None or now is None:
            return None
        return round((now[1] - self.then[1]) / max(1e-9, now[0] - self.then[0]), 3)


def describe(device: torch.device) -> dict[str, Any]:
    """What a result depends on: processor, cores, threads, versions, the GPU on CUDA, and the command line."""
    info: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": kernels.names()[0] if (kernels := library()) else None,
        "memory_bytes": _memory(),
        "huge_pages": huge_pages(),
        "system": platform.platform(),
        "device": str(device),
        "gpu": None,
        "versions": versions(),
        "command": shlex.join(["kvfold", *sys.argv[1:]]),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
        info["versions"]["cuda"] = torch.version.cuda
    return info


def versions() -> dict[str, str]:
    """Versions of what does the work."""
    from kvfold import __version__

    found = {"kvfold": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
