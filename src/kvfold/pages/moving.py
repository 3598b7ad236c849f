"""Pages that move: to a pool of a better size, to another table, or out of a row."""

import numpy as np

from kvfold.pages.planes import Planes
from kvfold.pages.pool import PagePool
from kvfold.pages.rows import nearly_even


class Moving(Planes):
    """Planes whose pages go where they take less room, or are read faster."""

    def relocate(self, pages: np.ndarray) -> None:
        """Move to a pool of our own with `pages[r]` pages side by side for row r; the old pages are let go."""
        table, regular = self._side_by_side(pages)
        held, mine = self._filled(table), self._filled(self.table)
        self.move_to(self.pool.moved(table[held], self.table[mine], int((table >= 0).sum())), table, regular=regular)

    def _filled(self, table: np.ndarray) -> np.ndarray:
        """Which entries of a table of our rows are pages that hold tokens, (R, M)."""
        filled: np.ndarray = np.arange(table.shape[1])[None] < self.needed[:, None]
        return filled

    def room_for(self, pages: np.ndarray) -> tuple[PagePool, np.ndarray, bool]:
        """Where to write `pages[r]` pages for each row anew: a pool, who has which page, and whether that is regular.

        It is a new pool, in which each row's pages lie side by side, or the arena's with pages that were free.
        """
        table, regular = self._side_by_side(pages)
        pool, wide = self.pool, (table >= 0).sum(1)
        if pool.arena is None:
            pool = pool.empty_like()
            pool.grow(int(wide.sum()))
        table[table >= 0] = pool.allocate_rows(wide, np.full(self.rows, -1))
        return pool, table, regular

    def _side_by_side(self, pages: np.ndarray) -> tuple[np.ndarray, bool]:
        """A table of pages numbered row by row, `pages[r]` for each, as many where all need almost as many; if so."""
        regular = not self.scattered and nearly_even(pages)
        wide = np.full(self.rows, pages.max() if self.rows else 0) if regular else pages
        table = np.full((self.rows, int(wide.max()) if self.rows else 0), -1, dtype=np.int32)
        table[np.arange(table.shape[1])[None] < wide[:, None]] = np.arange(int(wide.sum()))
        return table, regular

    def move_to(self, pool: PagePool, table: np.ndarray, *, regular: bool) -> None:
        """Our tokens lie there now; the old pages are let go."""
        self.pool.release(self.held)
        self.pool, self.table, self.regular, self._room = pool, table, regular, 0

    def trim(self, *, slack: bool = False) -> None:
        """Let go of every page past a row's length, and give the memory back where the pool is ours alone.

        `slack`: not while they are few beside what is held, lest every step of give and take moves all tokens.
        """
        needed, exclusive = self.needed, self.exclusive
        spare = (np.arange(self.table.shape[1])[None] >= needed[:, None]) & (self.table >= 0)
        self._room = 0
        if not spare.any() and not (exclusive and self.pool.used < self.pool.pages):
            return
        longest = int(needed.max()) if self.rows else 0
        if slack and int(spare.sum()) <= self.rows + 2 * max(self.rows, int(needed.sum()) // 32):
            return
        if not exclusive:
            self.pool.release(self.table[spare])
            self.table = np.where(spare, np.int32(-1), self.table)[:, :longest].copy()
            self.regular = False
            if not (self.exclusive and self.pool.free):  # it may have been these that others held
                return
        self.relocate(needed)

    def compact(self) -> None:
        """Where this table alone uses the pool and more than a quarter of it is free: move to a pool of what is held.

        Rows go on sharing the pages that they share.
        """
        old, held = self.pool, self.held
        if old.arena is not None or int(old.refs.sum()) != len(held) or old.free * 4 <= old.pages:
            return
        pool = old.empty_like()
        table = self._copied(pool)
        old.release(held)
        self.pool, self.table = pool, table
        order = np.arange(table.size).reshape(table.shape)
        self.regular = not self.scattered and bool((table == order).all())

    def drop_pages(self, gone: np.ndarray) -> None:
        """Drop the pages that `gone` (R, M) marks, with all their tokens; what is behind them moves up, uncopied.

        Only full pages, and the last of a row; there must be no holes. The pool keeps its size: see `trim`.
        """
        first = np.arange(self.table.shape[1]) * self.pool.page_size
        tokens = np.clip(self.lengths[:, None] - first, 0, self.pool.page_size)
        stays = (self.table >= 0) & ~(gone & (tokens > 0))
        self.pool.release(self.table[(self.table >= 0) & ~stays])
        order = np.argsort(~stays, axis=1, kind="stable")[:, : max(stays.sum(1), default=0)]
        self.table = np.take_along_axis(np.where(stays, self.table, np.int32(-1)), order, 1)
        self.lengths = (tokens * stays).sum(1).astype(np.int32)
        self.regular, self._room = False, 0

    def join(self, other: "Moving") -> None:
        """Take the rows of `other` behind ours; it holds nothing afterwards.

        In one pool references move over, else pages are copied. A column that one of the two lacks is its fill there.
        Raises ValueError, before anything is changed, where both have one of different kinds.
        """
        mine, theirs = self.pool, other.pool
        if theirs.page_size != mine.page_size:
            raise ValueError(f"other has pages of {theirs.page_size} tokens; ours have {mine.page_size}")
        for name in theirs.specs.keys() & mine.specs.keys():
            if theirs.specs[name] != mine.specs[name]:
                raise ValueError(f"other has column {name!r} as {theirs.specs[name]}; ours is {mine.specs[name]}")
        if not len(self.held) and theirs.arena is mine.arena:
            mine, theirs = theirs, mine  # we go on where the other's tokens lie
        for name in theirs.specs.keys() - mine.specs.keys():
            mine.add_plane(name, theirs.specs[name])
        self.pool = mine
        copied = other.table if other.pool is mine else other._copied(mine)
        tables = [self.table, copied]
        width = max(table.shape[1] for table in tables)
        if self.holed or other.holed:
            (holes, count), (more, others) = self.copy_holes(), other.copy_holes()
            self.holes, self.hole_count = np.concatenate([holes, more]), np.concatenate([count, others])
        self.table = np.concatenate([_wider(table, width) for table in tables])
        self.lengths = np.concatenate([self.lengths, other.lengths])
        if not self.holed:
            self.fill_holes()
        self.regular, self._room = False, 0
        if other.pool is mine:
            other.forget()
        other.release()
        if not self.scattered and self.exclusive and nearly_even(self.needed):
            self.relocate(self.needed)

    def _copied(self, pool: PagePool) -> np.ndarray:
        """Our pages in another pool, each once, in the order in which rows hold them; the table of them there."""
        pages, first, which = np.unique(self.held, return_index=True, return_inverse=True)
        if pool.arena is not None:
            pool.ensure(len(pages))
        elif len(pages) > pool.free:
            pool.grow(len(pages) - pool.free)
        new = np.empty_like(pages)
        order = np.argsort(first)
        new[order] = pool.allocate(len(pages))
        pool.copy(new[order], self.pool, pages[order])
        pool.moved_nbytes += len(pages) * pool.page_nbytes
        table = self.table.copy()
        table[table >= 0] = new[which]
        pool.retain(new[which])
        pool.release(new)
        return table


def _wider(table: np.ndarray, width: int) -> np.ndarray:
    return np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=-1)
