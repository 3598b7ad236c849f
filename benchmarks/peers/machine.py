"""What a peer's measurement takes from the machine, and what others took meanwhile (psutil is in both environments)."""

import time
from pathlib import Path

import psutil


def family() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def peak_rss() -> int:
    """Peak resident bytes of this process and of its children, added up (pages they share count more than once)."""
    lines = [line for process in family() for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


class Elsewhere:
    """Cores' worth of work of other programs since this was made: well above 0, the seconds are worth little."""

    def __init__(self) -> None:
        self.then = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        times = psutil.cpu_times()
        busy = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
        own = sum(each.user + each.system for each in (process.cpu_times() for process in family()))
        return time.perf_counter(), busy - own

    def cores(self) -> float:
        (start, before), (end, after) = self.then, self.now()
        return round((after - before) / (end - start), 3)
