"""Kivi: keys in a few bits by channel, values by token, behind them a dense residual (KIVI, arXiv:2402.02750)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.coded import CodedPages, coded_planes
from kvfold.formats.flat import Flat
from kvfold.formats.paged import open_table
from kvfold.formats.segment import Spec, Traits
from kvfold.formats.tailed import Tailed, TailedSegment
from kvfold.ops.codes.packing import BITS
from kvfold.options import check_choice, check_int
from kvfold.pages import Plane
from kvfold.pages.rows import spans

S = TypeVar("S", bound="KiviSegment")


@dataclass(frozen=True)
class Kivi(Tailed):
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

    whole = True

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

    def planes(self, spec: Spec) -> dict[str, Plane]:
        """What a page of codes holds."""
        return coded_planes(spec, self.bits, self.channels_of(spec))

    def open(self, spec: Spec) -> "KiviSegment":
        codes = open_table(self, spec, self.planes(spec), self.group)
        coded = CodedPages(codes, spec.heads, spec.dtype, spec.value_size, self.bits)
        return KiviSegment(self, coded, self.open_tail(spec))


class KiviSegment(TailedSegment[CodedPages]):
    """Pages of codes, then the newest tokens."""

    def _leave(self, tokens: Flat) -> None:
        self.coded.add_pages(tokens)

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
