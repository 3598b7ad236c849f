"""Symbols as bits: integer tables of how often each comes in a channel, and rANS by the library constriction."""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from jaxtyping import Integer

TOP = 1 << 16
"""What a table's probabilities add up to."""
MOST_SYMBOLS = 256
"""Of a table: codes have 8 bits at most."""


def table_of(counts: Integer[np.ndarray, "S n"]) -> Integer[np.ndarray, "S n+1"]:
    """The integer CDF of each channel, floor((65535 - n) cum_i / total) + i, which grows even where none came."""
    counts = np.asarray(counts, dtype=np.int64)
    n = counts.shape[1]
    cumulated = np.concatenate([np.zeros((len(counts), 1), dtype=np.int64), counts.cumsum(1)], axis=1)
    found: np.ndarray = (TOP - 1 - n) * cumulated // np.maximum(cumulated[:, -1:], 1) + np.arange(n + 1)
    return found


def check_tables(tables: Integer[np.ndarray, "S n"]) -> None:
    """Raise ValueError unless these are lower bounds of symbols: from 0 on, each above the one before, below 2^16."""
    if tables.ndim != 2 or not 2 <= tables.shape[1] <= MOST_SYMBOLS:
        raise ValueError(f"tables={tables.shape} must have 2 to {MOST_SYMBOLS} symbols each")
    if (tables[:, 0] != 0).any() or (np.diff(tables, axis=1) <= 0).any() or (tables[:, -1] >= TOP).any():
        raise ValueError(f"tables must grow from 0 and stay below {TOP}")


def encode(streams: Sequence[np.ndarray], tables: Integer[np.ndarray, "S n"]) -> Integer[np.ndarray, "W"]:
    """The 32-bit words (uint32) of S streams of symbols, stream i by the lower bounds tables[i], behind one another.

    Raises ImportError without constriction.
    """
    stream = _library().stream
    coder = stream.stack.AnsCoder()
    for symbols, widths in zip(reversed(streams), _widths(tables)[::-1], strict=True):
        if len(symbols):
            model = stream.model.Categorical(widths, perfect=False, lazy=False)
            coder.encode_reverse(np.ascontiguousarray(symbols, dtype=np.int32), model)
    words: np.ndarray = coder.get_compressed()
    return words


def decode(
    words: Integer[np.ndarray, "W"], tables: Integer[np.ndarray, "S n"], lengths: Sequence[int]
) -> list[Integer[np.ndarray, "T"]]:
    """The S streams (int32) of `lengths` symbols that `encode` took.

    Raises ValueError where the words are not those of so many symbols, ImportError without constriction.
    """
    check_tables(tables)
    stream = _library().stream
    coder = stream.stack.AnsCoder(np.ascontiguousarray(words, dtype=np.uint32))
    found = []
    for length, widths in zip(lengths, _widths(tables), strict=True):
        model = stream.model.Categorical(widths, perfect=False, lazy=False)
        found.append(coder.decode(model, int(length)) if length else np.zeros(0, dtype=np.int32))
    if not coder.is_empty():
        raise ValueError(f"{len(words)} words are not those of {sum(lengths)} symbols")
    return found


def _widths(tables: np.ndarray) -> np.ndarray:
    # As float64, in which whatever constriction works out of numbers of 16 bits for its own tables of 24 is exact.
    return np.diff(tables.astype(np.int64), axis=1, append=TOP).astype(np.float64)


def _library() -> ModuleType:
    try:
        import constriction
    except ImportError as missing:
        raise ImportError("codec='cachegen' needs constriction: pip install 'kvfold[codec]'") from missing
    found: ModuleType = constriction
    return found
