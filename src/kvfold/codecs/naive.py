"""The entropy coder in Python's integers: what `coder` must give, word for word.

Range asymmetric numeral systems (rANS, arXiv:1311.2540) with a state of up to 64 bits, words of 32 and probabilities of
24: a symbol of width p that begins at c takes the state x to (x // p) 2^24 + c + x % p; while that would not fit, the
lowest word leaves first. Symbols are coded from the last to the first, so that they are read from the first.
"""

from collections.abc import Sequence

TOP, FINE = 1 << 16, 1 << 24


def finer(table: Sequence[int]) -> list[int]:
    """The lower bounds of a table of 16 bits, and the end, in 24 bits: spread, and i more, so that none is empty."""
    bounds = [*table, TOP]
    room = FINE - len(table)
    total = TOP
    return [bound * room // total + i for i, bound in enumerate(bounds[:-1])] + [FINE]


def encode(streams: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]) -> list[int]:
    """The words of some streams, each with its table, behind one another."""
    state, words = 0, list[int]()
    for stream, table in zip(reversed(streams), reversed(tables), strict=True):
        bounds = finer(table)
        for symbol in reversed(stream):
            low, width = bounds[symbol], bounds[symbol + 1] - bounds[symbol]
            if state >> 40 >= width:
                words.append(state & 0xFFFFFFFF)
                state >>= 32
            state = (state // width << 24) + low + state % width
    while state:
        words.append(state & 0xFFFFFFFF)
        state >>= 32
    return words


def decode(words: Sequence[int], tables: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    """The streams again, each of so many symbols."""
    left, state, found = list(words), 0, list[list[int]]()
    while left and state < 1 << 32:
        state = state << 32 | left.pop()
    for table, length in zip(tables, lengths, strict=True):
        bounds, stream = finer(table), list[int]()
        for _ in range(length):
            place = state % FINE
            symbol = max(i for i in range(len(table)) if bounds[i] <= place)
            state = (state >> 24) * (bounds[symbol + 1] - bounds[symbol]) + place - bounds[symbol]
            if state < 1 << 32 and left:
                state = state << 32 | left.pop()
            stream.append(symbol)
        found.append(stream)
    return found
