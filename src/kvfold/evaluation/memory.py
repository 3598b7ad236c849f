"""What the process really holds."""

import ctypes
import gc
import os
from pathlib import Path


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not tell (no /proc).

    Garbage is collected first, and the C library gives back what it keeps for later: a peak that is over is not held.
    """
    gc.collect()
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
