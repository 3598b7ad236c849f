"""What the process really holds."""

import gc
import os
from pathlib import Path


def resident_bytes() -> int | None:
    """Resident memory of this process, garbage collected first; None where the system does not tell (no /proc)."""
    gc.collect()
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
