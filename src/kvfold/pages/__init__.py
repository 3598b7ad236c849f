"""Pages: fixed-size blocks of tokens, a pool that owns them, and a table that says which row holds which."""

from kvfold.pages.pool import PAGE_SIZE, PagePool, Plane
from kvfold.pages.table import PageTable

__all__ = ["PAGE_SIZE", "PagePool", "PageTable", "Plane"]
