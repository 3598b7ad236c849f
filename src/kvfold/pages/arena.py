"""An arena: a limit on the bytes that many pools hold together, as all caches of a server do."""

from collections.abc import Hashable, Mapping

import torch

from kvfold.pages.pool import PagePool
from kvfold.pages.storage import PAGE_SIZE, Plane


class OutOfPages(RuntimeError):
    """An arena has no room for `needed` bytes of pages: of its `capacity` only `free` are left. Nothing has changed."""

    def __init__(self, pages: int, needed: int, free: int, capacity: int):
        super().__init__(
            f"out of pages: {pages} more need {needed} bytes; {free} of the arena's {capacity} bytes are free"
        )
        self.needed, self.free, self.capacity = needed, free, capacity


class Arena:
    """At most `capacity` bytes of pages: one pool for each layer and format, which all caches share.

    Everything is pages: they are taken and given back, and rows lie on them in runs as well as they can. Pools grow in
    steps; while one does, or lays its rows anew, the plane that is copied is there twice.
    """

    def __init__(self, nbytes: int):
        given: object = nbytes
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ValueError(f"nbytes={nbytes!r} must be an int >= 1")
        self.capacity = nbytes
        self._pools: dict[Hashable, PagePool] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated, of pages in use and of free ones."""
        return sum(pool.nbytes for pool in self._pools.values())

    @property
    def used_nbytes(self) -> int:
        """Bytes of the pages that somebody holds."""
        return sum(pool.used * pool.page_nbytes for pool in self._pools.values())

    @property
    def pools(self) -> list[PagePool]:
        """All pools, in the order in which they were asked for."""
        return list(self._pools.values())

    def pool(
        self, key: Hashable, planes: Mapping[str, Plane], device: torch.device, page_size: int = PAGE_SIZE
    ) -> PagePool:
        """The one pool for `key`: all that makes pages alike, as the layer, the format, sizes and dtype.

        Planes that it lacks are added. Raises ValueError where it has one of another kind under the same name.
        """
        found = self._pools.get(key)
        if found is None:
            found = self._pools[key] = PagePool(planes, device, page_size, arena=self)
            return found
        if (found.device, found.page_size) != (device, page_size):
            raise ValueError(
                f"key={key!r} has pages of {found.page_size} tokens on {found.device}, not {page_size} on {device}"
            )
        for name, spec in planes.items():
            if found.specs.get(name, spec) != spec:
                raise ValueError(f"planes: {name!r} is {spec}; key={key!r} has it as {found.specs[name]}")
        for name, spec in planes.items():
            found.add_plane(name, spec)
        return found

    def check(self, requests: Mapping[PagePool, int]) -> None:
        """Raise OutOfPages unless each pool can hand out so many pages; then they lie free in it.

        Whoever writes to several tables asks for all of them first, so that none is left half written.
        """
        missing = {pool: pages - pool.free for pool, pages in requests.items() if pages > pool.free}
        if not missing:
            return
        needed = sum(pages * pool.page_nbytes for pool, pages in missing.items())
        self._room(sum(missing.values()), needed, set(requests))
        left = self.capacity - self.nbytes - needed
        for pool, pages in missing.items():  # more than that, so that tokens are not copied every time
            more = max(0, min(pool.pages // 8 - pages, left // pool.page_nbytes))
            pool.grow(pages + more)
            left -= more * pool.page_nbytes

    def reserve(self, pages: int, nbytes: int) -> None:
        """Raise OutOfPages unless so many more bytes may be allocated."""
        self._room(pages, nbytes, set(self._pools.values()))

    def _room(self, pages: int, needed: int, busy: set[PagePool]) -> None:
        if needed <= self.capacity - self.nbytes:
            return
        for pool in self._pools.values():
            if pool not in busy:
                pool.shrink()
        if needed > self.capacity - self.nbytes:
            raise OutOfPages(pages, needed, self.capacity - self.nbytes, self.capacity)
