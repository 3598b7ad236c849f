"""Pages: fixed-size blocks of tokens, a pool that owns them, and a table that says which row holds which.

A row is one (sequence, KV head). A pool has named planes, all indexed by page: `keys` (N, P, D), `values`
(N, P, D_v), one (N, P) plane for each column, and (N, W) for what a whole page has once. Pages are reference counted; a
page that two rows share is never written in place (copy-on-write). An arena limits what many pools hold together;
a fast memory limits what of them is in memory, or on a device, and the rest is in a file, or on the host.
"""

from kvfold.pages.arena import Arena, OutOfPages
from kvfold.pages.few import FewPages, FewSlots, ReadPages
from kvfold.pages.host import HostMemory
from kvfold.pages.pool import PagePool
from kvfold.pages.residency import Residency
from kvfold.pages.spill import SpillFile, SpillFull
from kvfold.pages.storage import PAGE_SIZE, Plane
from kvfold.pages.table import PageTable
from kvfold.pages.tier import FastMemory

__all__ = [
    "PAGE_SIZE", "Arena", "FastMemory", "FewPages", "FewSlots", "HostMemory", "OutOfPages", "PagePool", "PageTable",
    "Plane", "ReadPages", "Residency", "SpillFile", "SpillFull",
]  # fmt: skip
