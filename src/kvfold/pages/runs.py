"""Pages in runs: which free pages a row gets, so that what it reads one after another lies one after another.

Memory is read fastest in order, and nearly as fast in pieces of 64 KB. A pool counts in blocks of that size: a row goes
on right behind its last page, else in a block that nobody has begun, so that the rest of a begun block is there for the
row that began it; only where there is no such block left are its pages given to others.
"""

from collections.abc import Sequence

import numpy as np

RUN_BYTES = 1 << 16
"""From here on a run is read about as fast as a longer one (benchmarks/runs.py)."""


def stretches(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of each stretch of flags that are set."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2]


def blocks(free: np.ndarray, run: int, count: int) -> tuple[int, int] | None:
    """Start and length of a stretch of free pages that is whole blocks of `run`: the shortest for `count` pages.

    Else the longest there is; None where every block is begun. A block is left to whoever may end before it.
    """
    whole = np.logical_and.reduce(free[: len(free) // run * run].reshape(-1, run), axis=1)
    starts, lengths = stretches(whole)
    if not len(starts):
        return None
    wanted = -(-count // run)
    fits = np.where(lengths >= wanted, lengths, len(whole) + 1)
    best = int(fits.argmin()) if int(fits.min()) <= len(whole) else int(lengths.argmax())
    start, length = int(starts[best]), int(lengths[best])
    if start and length > wanted:
        start, length = start + 1, length - 1
    return start * run, min(count, length * run)


def place(free: np.ndarray, run: int, counts: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """`counts[r]` of the pages that are `free` for each row, row by row; the row's last page is `behind[r]`, -1: none.

    They are no longer marked as free; there must be enough.
    """
    found = [np.zeros(0, dtype=np.int64)]

    def take(start: int, length: int) -> int:
        free[start : start + length] = False
        found.append(np.arange(start, start + length))
        return length

    for count, last in zip(counts.tolist(), behind.tolist(), strict=True):
        ahead = free[last + 1 : last + 1 + count] if last >= 0 else free[:0]
        left = count - take(last + 1, len(ahead) if ahead.all() else int(ahead.argmin()))
        while left:
            piece = blocks(free, run, left)
            if piece is None:
                starts, lengths = stretches(free)
                longest = int(lengths.argmax())
                piece = int(starts[longest]), min(left, int(lengths[longest]))
            left -= take(*piece)
    return np.concatenate(found)


def broken(rows: Sequence[np.ndarray], run: int) -> int:
    """Pages of rows that lie in runs of fewer than `run`, but for rows that lie in one."""
    held = np.concatenate([np.append(row, -9) for row in rows]) if rows else np.zeros(0, dtype=np.int64)
    first = np.flatnonzero(np.diff(held, prepend=-9) != 1)
    lengths = np.diff(first, append=len(held))
    ends = held[first] == -9
    alone = ~ends & np.append(ends[1:], True) & np.append(True, ends[:-1])
    return int(lengths[(lengths < run) & ~alone & ~ends].sum())


def laid(rows: Sequence[np.ndarray], run: int, pages: int) -> tuple[np.ndarray, np.ndarray]:
    """All pages that `rows` hold, each once, and where they go among `pages` so that each row's lie side by side.

    A page that several rows hold goes with the first of them. Half of the free pages, at most a run for each row, lie
    behind rows, the others at the end.
    """
    held = np.concatenate(rows)
    _, first = np.unique(held, return_index=True)
    first.sort()
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[first]
    gap = min(run, (pages - len(first)) // (2 * len(rows)))
    return held[first], np.arange(len(first)) + gap * owner
