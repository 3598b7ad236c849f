"""The memory that pages lie in: large blocks ask the system for huge pages before anything is written to them."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HUGE = 1 << 21
"""Bytes of a huge page on x86-64, and on arm64 with pages of 4 KB."""
MADV_HUGEPAGE = 14
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages() -> str | None:
    """What the system grants: "always", "madvise" (to those that ask, as pools do) or "never"; None: it doesn't say."""
    try:
        text = SETTING.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def blank(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor to be filled. Under torch.inference_mode() too one that is written outside it later on."""
    with torch.inference_mode(False):
        made = torch.empty(tuple(shape), dtype=dtype, device=device)
    ask = advice()
    if device.type == "cpu" and ask is not None:
        start = -(-made.data_ptr() // HUGE) * HUGE
        stop = (made.data_ptr() + made.nbytes) // HUGE * HUGE
        if stop > start:
            ask(start, stop - start, MADV_HUGEPAGE)  # a refusal is no error: the pages are small ones, then
    return made


@cache
def advice() -> Callable[[int, int, int], int] | None:
    """The system's call, where it has one and listens."""
    if not sys.platform.startswith("linux") or huge_pages() in (None, "never"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    found: Callable[[int, int, int], int] = call
    return found
