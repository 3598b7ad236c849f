"""Stretches of a list that have room together: the whole list, or halves of it until they fit."""

from collections.abc import Callable, Iterator

from kvfold.pages.residency import Blocks

Wanted = Callable[[int, int], Blocks]
"""The blocks that a stretch reads and writes, each once."""


def in_turn(
    count: int, wanted: Wanted, room: Callable[[], int], most: int | None = None
) -> Iterator[tuple[int, int, Blocks]]:
    """Stretches (start, stop) of 0 to `count`, in order, with the blocks of each: as many as `room` says, or one entry.

    `most`: entries that a stretch may have.
    """
    todo = [(0, count)] if count else []
    while todo:
        start, stop = todo.pop()
        long = most is not None and stop - start > most
        if not long:
            blocks = wanted(start, stop)
            if len(blocks) <= room() or stop - start == 1:
                yield start, stop, blocks
                continue
        middle = (start + stop) // 2
        todo += [(middle, stop), (start, middle)]
