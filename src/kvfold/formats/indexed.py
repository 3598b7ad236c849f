"""A format whose segments remember an index of their tokens, so that a generated token reads few of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.formats.at_once import SEEN, AtOnce
from kvfold.formats.chosen import Chosen
from kvfold.formats.few import attend_and_give, attend_few, near
from kvfold.formats.few_values import attend_values
from kvfold.formats.index import Chooser, Compiled, Giving, Handed, Handing, Reader, Remembered, Taking, Weighing
from kvfold.formats.parts import Answer
from kvfold.formats.picked import Picked, check_picked, joined
from kvfold.formats.segment import Folding, Format, Hearing, Segment, Spec, Supposing, Traits, Uncaptured
from kvfold.formats.tokens import POSITION, Chunk
from kvfold.pages import PagePool
from kvfold.rotation import Compact

INNER, INDEX, CHOICE = "tokens.", "index.", "choice."
"""What tensors of a state are called after."""
NOWHERE = 2**31
"""A position behind any text."""


@contextmanager
def choices_seen(see: Callable[["IndexedSegment", Tensor, float, Chosen | None], None]) -> Iterator[None]:
    """In this block `see(segment, q, scale, chosen)` is called for each query (B, H, G, 1, D) that is about to attend.

    `chosen` are the units that are read for it; None: all. For measurements: what is given is not to be
    changed.
    """
    SEEN.append(see)
    try:
        yield
    finally:
        SEEN.remove(see)


@dataclass(frozen=True)
class Indexed:
    """Tokens in `form`, and of each unit of them what `selection` chooses by.

    Whatever is done to the tokens is done to the index: what comes later than a change of units is remembered anew from
    the tokens as they are stored. Prompts, and passes of several tokens, read everything.
    """

    form: Format
    selection: Reader

    @cached_property
    def way(self) -> type:
        """What kind of reader the selection is: asked once, for a protocol is slow to ask for."""
        kinds = (Weighing, Taking, Giving, Handing, Chooser)
        return next(kind for kind in kinds if isinstance(self.selection, kind))

    @cached_property
    def compiled(self) -> Compiled | None:
        """The selection, where a kernel may make its choice."""
        return self.selection if isinstance(self.selection, Compiled) else None

    @property
    def turns(self) -> bool:
        """Whether it needs the layer's rotation: its index turns keys, or what is read stands elsewhere."""
        return bool(self.selection.slots or self.selection.far or getattr(self.selection.index, "turns", False))

    @property
    def traits(self) -> Traits:
        """Those of `form`; behind a crop a row whose choice, or queries, would have served again begins anew."""
        traits = replace(self.form.traits, graphs=False)
        recalls = self.selection.reuses or getattr(self.selection.index, "recalls", False)
        return replace(traits, crops="approximate") if recalls and traits.crops == "exact" else traits

    def supposed(self, spec: Spec) -> Mapping[str, Any]:
        """See `Supposing`: of its tokens' format and its index, where those do without what was measured."""
        found: dict[str, Any] = {}
        for part in (self.form, self.selection.index):
            found.update(part.supposed(spec) if isinstance(part, Supposing) else {})
        return found

    def open(self, spec: Spec) -> "IndexedSegment":
        inner = self.form.open(spec)
        if isinstance(inner, Hearing | Folding):
            raise ValueError(f"form={self.form} is told of its rows beside their tokens: it can't be read in parts")
        if self.turns and spec.rope is None:
            raise ValueError(f"selection={self.selection} needs the model's RoPE, and layer {spec.layer} has none")
        return IndexedSegment(self, spec, inner, self.selection.index.open(spec), np.zeros(spec.rows, dtype=np.int64))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        """See `Format.check`."""
        inner, index, choice = _parts(tensors)
        read = said.get("read")
        whole = isinstance(read, list) and len(read) == spec.rows and all(type(x) is int and x >= 0 for x in read)
        if not whole or (seen is not None and (np.array(read) > seen).any()):
            raise ValueError(f"read={read!r} must be {spec.rows} ints, no more than each row has read")
        self.form.check(spec, said, inner, seen)
        counts = np.array(said["counts"], dtype=np.int64).reshape(spec.rows, spec.heads)
        self.selection.index.check(spec, index, counts)
        if choice and not self.selection.reuses:
            raise ValueError(f"choice={sorted(choice)} of a selection that chooses at every step")
        asking = counts if self.selection.heads is None else counts[:, np.array(self.selection.heads)]
        check_picked(choice, spec.rows, -(-asking // self.selection.unit))

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "IndexedSegment":
        """See `Format.restore`."""
        inner, index, choice = _parts(tensors)
        seen = np.array(said["read"], dtype=np.int64)
        if isinstance(twin, IndexedSegment):
            segment, known = self.form.restore(spec, said, inner, twin.inner), twin.index.select(np.arange(spec.rows))
            return IndexedSegment(self, spec, segment, known, seen)
        segment = self.form.restore(spec, said, inner, twin)
        held = Picked.restore(choice, spec.device) if choice else None
        return IndexedSegment(self, spec, segment, self.selection.index.restore(spec, index), seen, held)


class IndexedSegment(AtOnce, Uncaptured):
    """`inner` holds the tokens; `index` is of them as they are counted through, without gaps.

    `choice` is what was chosen last, where a selection uses it again; rows whose tokens change choose anew.
    """

    def __init__(
        self, form: Indexed, spec: Spec, inner: Segment, index: Remembered, seen: np.ndarray,
        choice: Picked | None = None,
    ):  # fmt: skip
        self.form, self.spec, self.inner, self.index = form, spec, inner, index
        self.seen, self.choice = seen, choice

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return self.bytes_beside(set())

    def bytes_beside(self, counted: set[int]) -> int:
        chosen = 0 if self.choice is None else self.choice.nbytes
        return self.inner.bytes_beside(counted) + self.index.nbytes + self.seen.nbytes + chosen

    @property
    def index_nbytes(self) -> int:
        """Bytes of the index."""
        return self.index.nbytes

    def nbytes_with(self, more: np.ndarray) -> int:
        """See `Segment.nbytes_with`."""
        units = -(-int((self.counts() + more).max(initial=0)) // self.form.selection.unit)
        selection, spec = self.form.selection, replace(self.spec, rows=len(self.seen))
        own: int = self.index.nbytes_with(units) + selection.nbytes_with(spec, units) + self.seen.nbytes
        return own + self.inner.nbytes_with(more)

    def row_nbytes(self) -> np.ndarray:
        sizes: np.ndarray = self.inner.row_nbytes() + self.index.row_nbytes()
        return sizes if self.choice is None else sizes + self.choice.row_nbytes()

    @property
    def longest(self) -> int:
        return self.inner.longest

    def counts(self) -> np.ndarray:
        return self.inner.counts()

    def lengths(self) -> np.ndarray:
        return self.inner.lengths()

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        """See `Segment.pages_for`."""
        return self.inner.pages_for(more)

    # -- reading -----------------------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, scale: float, *, read: Tensor | None = None, compact: Compact | None = None,
        weights: bool = False,
    ) -> Answer:  # fmt: skip
        """Over all that `read` says: see `Segment.attend`."""
        return self.inner.attend(q, scale, read=read, compact=compact, weights=weights)

    def attend_few(self, q: Tensor, scale: float, *, weights: bool = False, handed: Handed | None = None) -> Answer:
        """A generated token reads what is chosen for it; it is stored already. `handed`: see `Choosing`."""
        selection, counts, way, chosen = self.form.selection, self.inner.counts(), self.form.way, None
        handed = {} if handed is None else handed.setdefault(self.form.form, {})  # rows of other formats have their own
        if way is Weighing:
            return attend_values(self.inner, q, scale, cast(Weighing, selection), self.seen, weights=weights)
        if way is Taking:
            chosen = cast(Taking, selection).take(counts, handed, self.index)
        elif way is not Giving:
            if not (weights or SEEN) and (answer := self.attend_at_once(q, scale, counts)) is not None:
                return answer
            chosen = _choose(self, q, counts, handed)
        for see in SEEN:
            see(self, q, scale, chosen)
        if way is Giving:
            giving = cast(Giving, selection)
            return attend_and_give(self.inner, giving, q, scale, self.seen, handed, weights=weights)
        return _read(self, chosen, q, scale, weights)

    def columns(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.inner.columns()

    def dense(self) -> Chunk:
        return self.inner.dense()

    # -- writing -----------------------------------------------------------------------------------------------

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """See `Segment.append`; the index is of the keys as they come. A further turn is chosen for anew."""
        chunk, counts = _whole(chunk, self.index.columns), self.inner.counts()
        self.inner.append(chunk, even=even)
        if self.choice is not None and chunk.valid.shape[-1] > 1:
            self._stale((chunk.valid.sum(-1) > 1).cpu().numpy())
        self.index.extend(chunk, counts)
        if chunk.valid.numel():
            places = chunk.positions if even else chunk.positions.masked_fill(~chunk.valid, -1)
            self.seen = np.maximum(self.seen, places.amax((1, 2)).cpu().numpy().astype(np.int64) + 1)

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        """See `Segment.keep`. No slot stays empty: what is counted through has no gaps."""
        valid, _ = self.inner.columns()
        gone = valid & ~mask
        if not bool(gone.any()):
            self.inner.keep(mask, columns, slack=slack)
            return
        first = torch.where(gone, valid.cumsum(-1) - 1, valid.shape[-1]).amin(-1)
        self.inner.keep(mask, columns, slack=False)
        self._stale(gone.any(2).cpu().numpy())
        renew(self, np.minimum(first.cpu().numpy(), self.inner.counts()))

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """See `Segment.amend`."""
        self.inner.amend(slots, keys, values)
        if keys is not None and slots.shape[-1]:
            valid, _ = self.inner.columns()
            ranks = (valid.cumsum(-1) - 1).gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, valid.shape[-1])
            self._stale((slots >= 0).any(2).cpu().numpy())
            renew(self, np.minimum(ranks.amin(-1).cpu().numpy(), self.inner.counts()))

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """See `Segment.truncate`."""
        before, first = self.inner.counts(), first_gone(self.inner, counts)
        self.inner.truncate(counts, slack=slack)
        self._stale(counts < before)
        self.index.unlearn(first)
        self.seen = np.minimum(self.seen, first.min(1, initial=NOWHERE))
        renew(self, np.minimum(counts, before))

    def cropped(self, limit: np.ndarray) -> None:
        """See `Segment.cropped`."""
        self.inner.cropped(limit)
        rows: np.ndarray = limit < self.seen
        if self.choice is not None:
            self.choice.forget(rows)
        self.index.cropped(rows)
        self.index.unlearn(np.repeat(limit[:, None], self.spec.heads, 1))
        self.seen = np.minimum(self.seen, limit)

    def clear(self) -> None:
        self.inner.clear()
        self.index.clear()
        self.seen, self.choice = np.zeros_like(self.seen), None

    def drop_tokens(self) -> None:
        self.inner.drop_tokens()
        self.index.forget(np.zeros_like(self.inner.counts()))
        self.choice = None

    def _stale(self, changed: np.ndarray) -> None:
        """Where heads that choose have `changed` (B, H), what their row chose is of tokens that are others now."""
        if self.choice is not None:
            heads = self.form.selection.heads
            some: np.ndarray = changed if heads is None else changed[:, np.array(heads)]
            self.choice.forget(np.any(some, axis=1))

    # -- rows and pages ----------------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> "IndexedSegment":
        """See `Segment.select`."""
        at = np.asarray(rows)
        chosen = None if self.choice is None else self.choice.select(at)
        spec = replace(self.spec, rows=len(at))
        return IndexedSegment(self.form, spec, self.inner.select(rows), self.index.select(rows), self.seen[at], chosen)

    def join(self, other: Any) -> None:
        """Raises ValueError where it is no segment of the same format and sizes."""
        if not isinstance(other, IndexedSegment) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        self.inner.join(other.inner)
        self.index.join(other.index)
        self.choice = joined(self.choice, other.choice, (len(self.seen), len(other.seen)))
        self.seen = np.concatenate([self.seen, other.seen])
        self.spec = replace(self.spec, rows=len(self.seen))

    def compact(self) -> None:
        self.inner.compact()

    @property
    def shared(self) -> bool:
        return self.inner.shared

    def same_pages(self, other: Any) -> bool:
        """See `Segment.same_pages`."""
        return isinstance(other, IndexedSegment) and self.inner.same_pages(other.inner)

    def state(self, *, of: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Segment.state`."""
        said, tensors = self.inner.state(of=of)
        mine, told = {f"{INNER}{name}": x for name, x in tensors.items()}, {**said, "read": self.seen.tolist()}
        if of is not None:
            return told, mine
        self.index.forget(-(-self.inner.counts() // self.form.selection.unit))  # no room beyond what there is
        known = mine | {f"{INDEX}{name}": x for name, x in self.index.state().items()}
        chosen = {} if self.choice is None else self.choice.state()
        return told, known | {f"{CHOICE}{name}": x for name, x in chosen.items()}


def _choose(segment: IndexedSegment, q: Tensor, counts: Int[np.ndarray, "B H"], handed: Handed) -> Chosen | None:
    """What a chooser says; it is remembered, and handed on, where that is wanted."""
    chooser, index = cast(Chooser, segment.form.selection), segment.index
    if chooser.index.enough:  # something is fitted
        index.learn(segment.inner.dense, chooser.chooses(counts, segment.seen))
    chosen, segment.choice = chooser.choose(index, q[:, :, :, 0], counts, segment.seen, segment.choice)
    if segment.form.way is Handing:
        cast(Handing, chooser).hand(index, chosen, handed)
    return chosen


def _read(segment: IndexedSegment, chosen: Chosen | None, q: Tensor, scale: float, weights: bool) -> Answer:
    """Over the units that are chosen (None: all), at the positions that the selection says."""
    selection, inner, spec = segment.form.selection, segment.inner, segment.spec
    turned = near(q.device, spec.rope, segment.seen, selection.far)
    if chosen is None:
        return inner.attend(q, scale, compact=turned, weights=weights)
    rope, rows = spec.rope if selection.slots else None, None
    if rope is not None:
        rows = np.any(cast(Chooser, selection).chooses(inner.counts(), segment.seen), axis=1)
    where: dict[str, Any] = {"slots": rope, "seen": segment.seen, "rows": rows, "compact": turned}
    return attend_few(inner, q, scale, chosen, selection.unit, weights=weights, **where)


def _whole(chunk: Chunk, names: Sequence[str]) -> Chunk:
    """Tokens with all these columns: what lies on a page where nothing is written may be another token's."""
    lacking = [name for name in names if name not in chunk.columns]
    if not lacking:
        return chunk
    none = torch.zeros(chunk.valid.shape, dtype=torch.float32, device=chunk.valid.device)
    return chunk.but(chunk.valid, {**chunk.columns, **dict.fromkeys(lacking, none)})


def renew(segment: IndexedSegment, first: np.ndarray) -> None:
    """Remember tokens `first[b, h]` and on of each row anew, and what lies in the same unit before them."""
    unit, begins, counts = segment.form.selection.unit, segment.index.begins(first), segment.inner.counts()
    units, changed, heads = begins // unit, (first < counts) | (begins < first), segment.form.selection.heads
    if heads is not None:
        changed &= np.array(heads)  # of the others nothing is remembered
    if not changed.any():
        segment.index.forget(-(-counts // unit))
        return
    units = np.where(changed, units, -(-counts // unit))
    segment.index.forget(units)
    start = units * unit
    segment.index.extend(onward(segment.inner.dense(), start), start)


def first_gone(segment: Segment, counts: Int[np.ndarray, "B H"]) -> Int[np.ndarray, "B H"]:
    """Where in the text token `counts[b, h]` of each row stands; `NOWHERE`: there is none."""
    valid, columns = segment.columns()
    stays = valid.cumsum(-1) <= torch.from_numpy(counts).to(valid.device)[..., None]
    places = columns[POSITION].long().masked_fill(~valid | stays, NOWHERE)
    found = places.amin(-1) if places.shape[-1] else places.new_full(places.shape[:2], NOWHERE)
    first: np.ndarray = found.cpu().numpy()
    return first


def onward(tokens: Chunk, start: Int[np.ndarray, "B H"]) -> Chunk:
    """Tokens `start[b, h]` and on of each row and head."""
    begin = torch.from_numpy(start).to(tokens.valid.device)[..., None]
    wanted = tokens.valid & (tokens.valid.cumsum(-1) > begin)
    most = int(wanted.sum(-1).max()) if wanted.numel() else 0
    order = torch.argsort((~wanted).byte(), dim=-1, stable=True)[..., :most]
    return tokens.take(order).but(wanted.gather(-1, order))


def _parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What a state has of tokens, of the index and of a choice. ValueError for what is of none of them."""
    strange = sorted(name for name in tensors if not name.startswith((INNER, INDEX, CHOICE)))
    if strange:
        raise ValueError(f"tensors: {strange[0]!r} must begin with {INNER!r}, {INDEX!r} or {CHOICE!r}")
    inner, index, choice = (
        {n.removeprefix(p): x for n, x in tensors.items() if n.startswith(p)} for p in (INNER, INDEX, CHOICE)
    )
    return inner, index, choice
