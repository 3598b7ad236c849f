"""Kivi: keys in a few bits by channel, values by token, behind them a dense residual (KIVI, arXiv:2402.02750)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.coded import CodedPages, coded_planes
from kvfold.formats.dense import Dense, DenseSegment
from kvfold.formats.flat import Flat
from kvfold.formats.paged import check_positions, check_tensors, open_table, refilled, said_counts
from kvfold.formats.segment import Segment, Spec, Traits
from kvfold.formats.tailed import TailedSegment
from kvfold.formats.tokens import POSITION, Chunk
from kvfold.ops.codes.packing import BITS
from kvfold.options import check_choice, check_int, shown
from kvfold.pages import PAGE_SIZE, PagePool
from kvfold.pages.rows import spans

S = TypeVar("S", bound="KiviSegment")


@dataclass(frozen=True)
class Kivi:
    """Pages of `group` tokens in codes of `bits` bits, behind them at least `residual` tokens in full precision.

    A channel of the keys has a scale and a zero for each page, `channels` numbers of a value have theirs for each
    token. As soon as a (row, head) has `residual + group` tokens behind its pages, the oldest `group` of them become a
    page: once, for codes are never made anew as the cache grows, and streaming gives the codes of one shot.
    A page is dropped whole. With `requantise` any token may be dropped or amended: those of its row that stay, from
    the first page on that loses some, are rounded once more (at every step that drops one of them); fewer than a page
    go back in front of the residual. A crop leaves what was rounded as it is, and puts the rest of a page that it cuts
    into the residual.
    Differs from the paper: keys and values are flushed together, page by page, so that a token is in one segment and
    has one softmax; the residual never runs empty (the paper's keys hold 0 to residual - 1 tokens as they are).
    """

    bits: int = 4
    group: int = 32
    channels: int = 32
    residual: int = 128
    requantise: bool = False

    def __post_init__(self) -> None:
        check_int("bits", self.bits, min(BITS), high=max(BITS))
        check_choice("bits", self.bits, BITS)
        check_int("group", self.group, 8)
        if self.group % 2:
            raise ValueError(f"group={self.group} must be even")
        check_int("channels", self.channels, 1)
        check_int("residual", self.residual, 0)
        check_choice("requantise", self.requantise, (False, True))

    @property
    def traits(self) -> Traits:
        return Traits(addressed="page", crops="approximate", requantises=self.requantise)

    def channels_of(self, spec: Spec) -> int:
        """Numbers of a value that share a scale. Raises ValueError where they don't come out even."""
        channels = min(self.channels, spec.value_size)
        if spec.value_size % channels:
            raise ValueError(f"channels={self.channels} must divide the value size {spec.value_size}")
        return channels

    @property
    def newest(self) -> Dense:
        """The format of the tail: so many tokens a page that a group is whole pages."""
        return Dense(page_size=math.gcd(self.group, PAGE_SIZE))

    def open(self, spec: Spec) -> "KiviSegment":
        planes, newest = coded_planes(spec, self.bits, self.channels_of(spec)), self.newest
        codes = open_table(self, spec, planes, self.group)
        tail = open_table(newest, spec, newest.planes(spec), newest.page_size, scattered=True)
        coded = CodedPages(codes, spec.heads, spec.dtype, spec.value_size, self.bits)
        return KiviSegment(self, coded, DenseSegment(tail, spec.heads, spec.dtype))

    def check(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], seen: np.ndarray | None = None
    ) -> None:
        counts, coded = self._counts(spec, said)
        parts, newest = _parts(tensors), self.newest
        check_tensors(parts[0], coded_planes(spec, self.bits, self.channels_of(spec)), coded, self.group)
        check_tensors(parts[1], newest.planes(spec), counts - coded)
        for part, some in zip(parts, (coded, counts - coded), strict=True):
            check_positions(some, part[POSITION], seen)

    def _counts(self, spec: Spec, said: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each row, and how many of them are coded, (B, H). ValueError where that can't be."""
        counts, coded = said_counts(spec, said), said_counts(spec, said, "coded")
        if (coded % self.group).any() or (coded > counts).any():
            raise ValueError(
                f"coded={shown(said['coded'])} must be multiples of group={self.group}, counts={shown(said['counts'])}"
            )
        return counts, coded

    def restore(
        self, spec: Spec, said: Mapping[str, Any], tensors: Mapping[str, Tensor], twin: Segment | None = None
    ) -> "KiviSegment":
        counts, coded = self._counts(spec, said)
        if twin is not None:
            if isinstance(twin, KiviSegment) and np.array_equal([twin.counts(), twin.coded.counts()], [counts, coded]):
                return twin.select(np.arange(spec.rows))
            raise ValueError(f"counts={said['counts']} must be those of the segment that holds the same pages")
        self.check(spec, said, tensors)
        parts, segment = _parts(tensors), self.open(spec)
        refilled(segment.coded, coded, parts[0])
        refilled(segment.tail, counts - coded, parts[1])
        return segment


def _parts(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What a state has of codes and of the tail. ValueError for what is of neither."""
    strange = sorted(name for name in tensors if name.partition(".")[0] not in ("coded", "tail"))
    if strange:
        raise ValueError(f"tensors: {strange[0]!r} must begin with 'coded.' or 'tail.'")
    return [{n.removeprefix(p): x for n, x in tensors.items() if n.startswith(p)} for p in ("coded.", "tail.")]


class KiviSegment(TailedSegment[CodedPages]):
    """Pages of codes, then the newest tokens."""

    def __init__(self, form: Kivi, coded: CodedPages, tail: DenseSegment):
        super().__init__(coded, tail)
        self.form = form

    def like(self: S, coded: CodedPages, tail: DenseSegment) -> S:
        return type(self)(self.form, coded, tail)

    def join(self, other: Any) -> None:
        if not isinstance(other, KiviSegment) or other.form != self.form:
            raise ValueError(f"other={getattr(other, 'form', type(other).__name__)!r} must be of format {self.form}")
        super().join(other)

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        moved = self._moved(more)
        beyond = np.maximum(moved - self.tail.counts(), 0)
        # A row that is coded beyond its tail begins a page where it had a part of one.
        tail = self.tail.table.pages_for((more - beyond).reshape(-1)) + int((beyond > 0).sum())
        if self.tail.table.holed and self.tail.shared:  # holes are closed first, on pages of its own
            tail += int(self.tail.table.needed.sum()) + self.tail.table.rows
        return {self.coded.pool: int(moved.sum()) // self.form.group, self.tail.pool: tail}

    def _moved(self, more: np.ndarray) -> np.ndarray:
        """Tokens that are coded when so many more come, (B, H)."""
        over = self.tail.counts() + more - self.form.residual
        moved: np.ndarray = np.maximum(over // self.form.group, 0) * self.form.group
        return moved

    def _front(self, counts: np.ndarray) -> Flat:
        """The first so many tokens of each row's tail, which then has no holes."""
        self.tail.close()
        rows, slots = spans(np.zeros(counts.size, dtype=np.int64), counts.reshape(-1))
        return Flat(counts.reshape(-1), self.tail.table.read(self.tail.pool.planes, rows, slots))

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        for part in self.parts:
            part.add_columns(chunk.columns)
        more = np.full(self.counts().shape, chunk.valid.shape[-1]) if even else chunk.valid.sum(-1).cpu().numpy()
        moved = self._moved(more)
        if not moved.any():
            self.tail.append(chunk, even=even)
            return
        old = self._front(np.minimum(moved, self.tail.counts()))
        self.ask(self.pages_for(more))
        beyond = moved - old.counts.reshape(moved.shape)
        now = chunk.valid & (chunk.valid.cumsum(-1) <= self.coded.place(beyond)[..., None])
        states = {"keys": chunk.keys[now].to(self.tail.compute), "values": chunk.values[now].to(self.tail.compute)}
        new = Flat(beyond.reshape(-1), states | {name: column[now] for name, column in chunk.columns.items()})
        self.coded.add_pages(old.then(new))
        first = np.arange(self.tail.table.table.shape[1]) * self.tail.pool.page_size
        self.tail.table.drop_pages(first < old.counts[:, None])
        self.tail.append(chunk.but(chunk.valid & ~now))

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        cut, group, table, tail = self.coded.longest, self.form.group, self.coded.table, self.tail
        marks = mask[..., :cut].flatten(0, 1) & table.valid()  # R T
        left = marks.view(len(marks), cut // group, group).sum(-1).cpu().numpy()  # of each page
        cuts = (left > 0) & (left < group)
        if cuts.any() and not self.form.requantise:
            raise ValueError(f"mask drops some tokens of a page of {group}, not all: that takes Kivi(requantise=True)")
        for part in self.parts:
            part.add_columns(columns)  # a plane takes room, too: before pages are asked for
        behind = np.maximum.accumulate(cuts, axis=1)  # from the first page on that loses some
        front = marks & self.coded.place(np.repeat(behind, group, axis=1))
        gone = np.pad((left == 0) | behind, ((0, 0), (0, table.table.shape[1] - left.shape[1])))
        stays, counts = mask[..., cut:] & tail.valid(), front.sum(1).cpu().numpy()
        anew, kept = cuts.any(1), stays.flatten(0, 1).sum(-1).cpu().numpy()
        pages = self._packed(counts, kept) * anew
        self._ask_to_keep(gone, pages, kept, np.where(anew, counts + kept - pages * group, 0), bool(columns))
        self.coded.set_columns({name: column[..., :cut] for name, column in columns.items()})
        decoded = Flat(counts, self.coded.read(*(x.cpu().numpy() for x in front.nonzero(as_tuple=True))))
        table.drop_pages(gone)
        table.trim(slack=slack and table.pool.free * 8 <= table.pool.pages)
        tail.keep(stays, {name: column[..., cut:] for name, column in columns.items()}, slack=slack)
        if anew.any():
            packed, rest = decoded.then(self._front(kept * anew)).split(pages * group)
            self.coded.add_pages(packed)
            tail.table.cut(np.where(anew, 0, kept))
            tail.table.add(rest.counts, rest.planes)

    def _packed(self, front: np.ndarray, tail: np.ndarray) -> np.ndarray:
        """Pages that so many tokens become, taken out of pages, and in front of so many of the tail."""
        least = np.maximum(front + tail - self.form.residual, 0)  # what would leave too long a tail
        pages: np.ndarray = np.maximum(front, least) // self.form.group
        return pages

    def _ask_to_keep(
        self, gone: np.ndarray, pages: np.ndarray, kept: np.ndarray, rest: np.ndarray, columns: bool
    ) -> None:
        """Raise OutOfPages where what `keep` does would find no room half way."""
        coded, tail = self.coded.table, self.tail.table
        size, refs = tail.pool.page_size, coded.pool.refs
        freed = int((refs[coded.table[gone & (coded.table >= 0)]] == 1).sum())
        copied = int((refs[coded.held] > 1).sum()) if columns else 0
        room, moved = (tail.table >= 0).sum(1), 0
        if tail.shared:
            room, moved = np.zeros_like(room), int((-(-kept // size)).sum())
        wanted = moved + int(np.maximum(-(-rest // size) - room, 0).sum())
        self.ask({coded.pool: copied + max(0, int(pages.sum()) - freed), tail.pool: wanted})

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        cut, flat = self.coded.longest, slots.flatten(0, 1)
        some = (flat >= 0) & (flat < cut)
        if bool(some.any()):
            if not self.form.requantise:
                raise ValueError("slots name tokens of pages that are coded: that takes Kivi(requantise=True)")
            if self.shared:  # a copy of a page for each of them, if it comes to that
                self.ask({self.coded.pool: int(some.sum()), self.tail.pool: int((flat >= cut).sum())})
            rows, at = some.nonzero()[:, 0].cpu().numpy(), flat[some].cpu().numpy()
            self.coded.rewrite(rows, at, *(None if x is None else x.flatten(0, 1)[some] for x in (keys, values)))
        self.tail.amend(torch.where(slots < cut, -1, slots - cut), keys, values)

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        counts, coded = np.minimum(counts, self.counts()), self.coded.counts()
        whole = np.where(counts < coded, counts // self.form.group * self.form.group, coded)
        left = np.where(counts < coded, counts - whole, 0).reshape(-1)
        self.ask({self.tail.pool: int((-(-left // self.tail.pool.page_size)).sum())})
        planes = self.coded.read(*spans(whole.reshape(-1), left))
        self.coded.truncate(whole, slack=slack)
        self.tail.table.cut(np.maximum(counts - coded, 0).reshape(-1))
        self.tail.table.add(left, planes)
        self.tail.table.trim(slack=slack)
