"""What a cache file's header says, each entry checked before it is believed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.formats import Format, Spec, dtype_from, format_from
from kvfold.options import LARGEST, shown


class Entry:
    """An object of the header; what is asked of it is there and of its kind, or ValueError says where it is not."""

    def __init__(self, where: str, said: object):
        if not isinstance(said, dict):
            raise ValueError(f"{where} has {shown(said)} where an object must be")
        self.where, self.said = where, said

    def fail(self, name: str, allowed: str) -> ValueError:
        """The error for an entry."""
        return ValueError(f"{self.where} has {name}={shown(self.said.get(name))}, which must be {allowed}")

    def null(self, name: str) -> bool:
        """Whether there is nothing under a name."""
        return self.said.get(name) is None

    def text(self, name: str) -> str:
        """A text."""
        found = self.said.get(name)
        if not isinstance(found, str):
            raise self.fail(name, "a text")
        return found

    def flag(self, name: str) -> bool:
        """True or false."""
        found = self.said.get(name)
        if not isinstance(found, bool):
            raise self.fail(name, "true or false")
        return found

    def integer(self, name: str, low: int = 0, high: int = LARGEST) -> int:
        """A number in [low, high]."""
        found = self.said.get(name)
        if type(found) is not int or not low <= found <= high:
            raise self.fail(name, f"an int in [{low}, {high}]")
        return found

    def items(self, name: str, length: int | None = None) -> list[Any]:
        """A list, of so many items."""
        found = self.said.get(name)
        if not isinstance(found, list) or (length is not None and len(found) != length):
            raise self.fail(name, "a list" if length is None else f"a list of {length}")
        return found

    def integers(self, name: str, length: int | None = None, high: int = LARGEST) -> np.ndarray:
        """A list of numbers in [0, high], as int64."""
        found = self.items(name, length)
        if not all(type(each) is int and 0 <= each <= high for each in found):
            raise self.fail(name, f"ints in [0, {high}]")
        return np.array(found, dtype=np.int64)

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        found = self.items(name)
        if not all(isinstance(each, str) for each in found):
            raise self.fail(name, "texts")
        return found

    def dtype(self, name: str) -> torch.dtype:
        """What a model computes in."""
        try:
            return dtype_from(self.said.get(name))
        except ValueError as error:
            raise ValueError(f"{self.where} has {error}") from None

    def part(self, name: str) -> "Entry":
        """An object."""
        return Entry(f"{self.where}, {name},", self.said.get(name))


@dataclass(frozen=True, eq=False)
class SaidRows:
    """What the rows have read, see `Rows`."""

    seen: np.ndarray
    prompt: np.ndarray
    width: int

    @classmethod
    def of(cls, header: Entry) -> "SaidRows":
        """The header's `rows`."""
        entry = header.part("rows")
        seen = entry.integers("seen")
        prompt = entry.integers("prompt", len(seen))
        if (prompt > seen).any():
            raise entry.fail("prompt", f"no more than seen={seen.tolist()}")
        return cls(seen, prompt, entry.integer("width", low=int(seen.max(initial=0))))


@dataclass(frozen=True, eq=False)
class SaidGroup:
    """A method's text, its rows (None: all), and the columns that it has set."""

    method: str
    rows: np.ndarray | None
    names: frozenset[str]


def groups_of(header: Entry, batch: int) -> list[SaidGroup]:
    """The header's `groups`: rows of the batch, each in one of them."""
    found = []
    for number, said in enumerate(header.items("groups")):
        entry = Entry(f"group {number}", said)
        rows = None if entry.null("rows") else entry.integers("rows", high=max(0, batch - 1))
        found.append(SaidGroup(entry.text("method"), rows, frozenset(entry.texts("names"))))
    lists = [group.rows for group in found if group.rows is not None]
    if len(found) == 1 and not lists:
        return found
    if not found or len(lists) != len(found) or sorted(np.concatenate(lists).tolist()) != list(range(batch)):
        raise header.fail("groups", f"one of all rows, or several of which each of the {batch} rows is in one")
    return found


@dataclass(frozen=True, eq=False)
class SaidRecent:
    """What a layer remembers of generated tokens' queries, see `Recent`."""

    entry: Entry
    at: np.ndarray
    since: np.ndarray

    @classmethod
    def of(cls, entry: Entry, batch: int) -> "SaidRecent":
        """A layer's entry of that name."""
        rows = entry.items("at", batch)
        sizes = {len(row) if isinstance(row, list) else 0 for row in rows}
        whole = all(
            type(place) is int and -1 <= place <= LARGEST for row in rows if isinstance(row, list) for place in row
        )
        if len(sizes) != 1 or 0 in sizes or not whole:
            raise entry.fail("at", f"{batch} lists of as many text positions, or -1")
        at = np.array(rows, dtype=np.int64)
        if (at % at.shape[1] != np.arange(at.shape[1]))[at >= 0].any():
            raise entry.fail("at", "position p at place p % size of its list")
        return cls(entry, at, entry.integers("since", batch))

    def check(self, tensors: Mapping[str, Tensor], spec: Spec, seen: np.ndarray) -> None:
        """Raise ValueError unless the tensors are of that size, and nothing is of a text that was not read."""
        states, lse, batch, size = tensors.get("states"), tensors.get("lse"), *self.at.shape
        heads = 0 if states is None or states.dim() != 4 else states.shape[1]
        want = {
            "states": ((batch, heads, size, spec.key_size), spec.dtype), "lse": ((batch, heads, size), torch.float32)
        }  # fmt: skip
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if not heads or heads % spec.heads or found != want or lse is None:
            raise ValueError(f"{self.entry.where} has tensors {found}, which must be (shape, dtype) {want}")
        if (self.at >= seen[:, None]).any() or (self.since > seen).any():
            raise self.entry.fail("since", f"no more than seen={seen.tolist()}, as must all of at")


@dataclass(frozen=True, eq=False)
class SaidLayer:
    """A layer on pages: heads and sizes (None: it has attended nothing), its formats, and which of them are open."""

    shape: tuple[int, int, int] | None
    dtype: torch.dtype
    opened: np.ndarray
    ordered: bool
    formats: tuple[tuple[Format, Mapping[str, Any]], ...]
    """Each with its whole entry, which `Format.check` and `Format.restore` look at."""
    recent: SaidRecent | None = None

    @classmethod
    def of(cls, entry: Entry, batch: int) -> "SaidLayer":
        """A layer's entry."""
        shape: tuple[int, int, int] | None = None
        if not entry.null("shape"):
            heads, keys, values = entry.integers("shape", 3).tolist()
            shape = heads, keys, values
        if shape is not None and 0 in shape:
            raise entry.fail("shape", "heads and the sizes of keys and values")
        formats: list[tuple[Format, Mapping[str, Any]]] = []
        for number, said in enumerate(entry.items("formats")):
            each = Entry(f"{entry.where}, format {number},", said)
            try:
                form = format_from(each.said)
            except ValueError as error:
                raise ValueError(f"{each.where} has {error}") from None
            if any(form == other for other, _ in formats):
                raise ValueError(f"{each.where} has {form} twice")
            formats.append((form, each.said))
        if (shape is None) != (not formats):
            raise entry.fail("shape", "null where there are no formats, and only there")
        opened = entry.integers("opened", batch if formats else None, high=max(0, len(formats) - 1))
        recent = None if entry.null("recent") or shape is None else SaidRecent.of(entry.part("recent"), batch)
        return cls(shape, entry.dtype("dtype"), opened, entry.flag("ordered"), tuple(formats), recent)


def check_reading(entry: Entry, tensors: Mapping[str, Tensor], rows: SaidRows) -> None:
    """Raise ValueError unless these can be a `Reading` of the rows' text."""
    valid, places, given = tensors["valid"], tensors["places"], tensors["given"]
    shape, batch = tuple(valid.shape), len(rows.seen)
    kinds = {"valid": (shape, torch.bool), "places": (shape, torch.int32), "given": ((batch,), torch.int64)}
    for name, kind in kinds.items():
        found = tuple(tensors[name].shape), tensors[name].dtype
        if found != kind or len(shape) != 2 or shape[0] != batch:
            raise ValueError(f"{entry.where} has {name}={found}, which must be (shape, dtype) of {batch} rows")
    entry.integer("surplus", low=-LARGEST)
    entry.integer("fixed", high=shape[1])
    if valid.sum(1).tolist() != rows.seen.tolist():
        raise ValueError(f"{entry.where} has other tokens than the {rows.seen.tolist()} that the rows have read")
    if bool((given < 0).any()) or bool((places < -1).any()) or bool((places >= given[:, None].clamp(min=1)).any()):
        raise ValueError(f"{entry.where} has places={shown(places.tolist())} beyond given={shown(given.tolist())}")
