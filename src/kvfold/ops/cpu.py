"""What the compiled CPU kernels share: whether they are there and fit, and on how many threads they run.

`kvfold.ops._cpu` (sources: cpp/) is compiled when kvfold is installed. Where that could not be done, nothing fits and
every operation runs its version in plain torch.
"""

import logging
import math
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""As what the kernels read floats that NumPy does not know, or not well."""
ROWS = 64
"""Queries of a row (heads of its group times queries) up to which kernels read pages faster than a dense product."""
PAGE_SIZES = (4, 8, 16, 32, 64)
"""Whole pages make a block of 64 tokens, and a product takes four tokens at once."""
CGROUP = Path("/sys/fs/cgroup")


@cache
def library() -> ModuleType | None:
    """The compiled kernels, or None, said once, where they are not there."""
    try:
        from kvfold.ops import _cpu
    except ImportError as missing:
        if os.environ.get("KVFOLD_ISA"):
            raise  # what was asked for by name is not there
        logging.getLogger("kvfold").warning(
            "the CPU kernels are not there (%s): plain torch does their work, several times slower; "
            "install kvfold where a C++20 compiler is",
            missing,
        )
        return None
    return _cpu


def fits(x: Tensor) -> bool:
    """Whether the kernels can take it: on the CPU, a float that they can read, and no gradient wanted."""
    return x.device.type == "cpu" and x.dtype in FLOATS and not x.requires_grad and library() is not None


def holds(x: Tensor) -> bool:
    """Whether the kernels that only move numbers can take it: a byte for each will do too."""
    return fits(x) or (x.device.type == "cpu" and x.dtype == torch.uint8 and library() is not None)


def widths_fit(*widths: int) -> bool:
    """Whether rows of these many numbers can be read in whole vectors."""
    return not any([width % 4 for width in widths])


def answers(pool: Any, queries: int, mass: str | None, d: int, *widths: int) -> bool:
    """Whether a kernel can answer so many queries of a row over pages of this pool, of `d` numbers, and of others."""
    masses = mass is None or pool.specs[mass].dtype == torch.float32
    return masses and 0 < queries <= ROWS and d > 0 and widths_fit(d, *widths)


def reads_pages(pool: Any, queries: int, d: int, mass: str | None) -> bool:
    """Whether the kernel can answer so many queries of a row over keys and values on the pages of this pool."""
    keys, values = pool.specs["keys"], pool.specs["values"]
    kinds = (
        keys.dtype in FLOATS and values.dtype in FLOATS and (mass is None or pool.specs[mass].dtype == torch.float32)
    )
    # As `answers` says, but in place: each layer asks at every step.
    sizes = 0 < queries <= ROWS and d > 0 and pool.page_size in (1, *PAGE_SIZES) and not (d % 4 or values.width % 4)
    return kinds and sizes and pool.device.type == "cpu" and library() is not None


def threads() -> int:
    """Threads for the kernels: torch's number, and no more than the cores that this process is granted."""
    return min(torch.get_num_threads(), granted())


@cache
def granted() -> int:
    """Cores that this process may use: by its affinity, and by its container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, quota(CGROUP))))


def quota(root: Path) -> float:
    """Cores' worth of time that a control group grants (v2 or v1, its files under `root`); inf for no limit."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((root / name).read_text() for name in files).split()
            time, period = float(words[0].replace("max", "inf")), float(words[1])
        except (OSError, ValueError, IndexError):
            continue  # no such file: the other version of control groups, or none
        return time / period if time > 0 and period > 0 else math.inf
    return math.inf


def floats(x: Tensor) -> np.ndarray:
    """A tensor as a contiguous float32 array."""
    wide = x if x.dtype == torch.float32 else x.float()
    array: np.ndarray = wide.contiguous().numpy()
    return array


def bits(x: Tensor) -> np.ndarray:
    """A tensor as the kernels read it, contiguous: bfloat16 as uint16, float16 as int16, others as they are."""
    kind = BITS.get(x.dtype)
    array: np.ndarray = (x if kind is None else x.contiguous().view(kind)).contiguous().numpy()
    return array
