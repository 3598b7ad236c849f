"""Checks of options: each error names the option, the value and what is allowed."""

from collections.abc import Collection
from operator import index
from typing import Any


def shown(value: object) -> str:
    """A value as an error shows it, cut where it is long."""
    if isinstance(value, int) and value.bit_length() > 999:  # Python does not print longer ones
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


LARGEST = 2**31 - 1
"""More tokens than any text has, and what an int32 holds."""


def check_int(name: str, value: object, low: int, odd: bool = False, high: int = LARGEST) -> None:
    """Raise ValueError unless `value` is an int in [`low`, `high`] (and odd, where asked)."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high or (odd and value % 2 == 0):
        raise ValueError(f"{name}={shown(value)} must be an{' odd' if odd else ''} int >= {low} and <= {high}")


def check_number(name: str, value: object, low: float, high: float = LARGEST) -> None:
    """Raise ValueError unless `value` is a number in [low, high]."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name}={shown(value)} must be a number in [{low}, {high}]")


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(map(repr, allowed))}")


def check_ints(name: str, values: object) -> None:
    """Raise ValueError unless `values` is a tuple of ints."""
    ints = isinstance(values, tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not ints:
        raise ValueError(f"{name}={shown(values)} must be a tuple of ints")


def check_rows(rows: Any, batch: int) -> tuple[int, ...]:
    """The rows as ints. Raise ValueError unless they are different rows of a batch; flags are none."""
    try:
        each = rows.tolist() if hasattr(rows, "tolist") else rows  # of arrays and tensors
        found = [-1 if isinstance(row, bool) else index(row) for row in each]
    except TypeError:
        found = [-1]
    if len(set(found)) != len(found) or not all(0 <= row < batch for row in found):
        there = f"0 to {batch - 1}" if batch else "which has none: nothing was read"
        raise ValueError(f"rows={shown(rows)} must be different rows of the batch, {there}")
    return tuple(found)


def check_name(name: str, value: object, allowed: str) -> None:
    """Raise ValueError unless `value` is None or a text that is not empty; `allowed` says what it names."""
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"{name}={shown(value)} must be {allowed}")
