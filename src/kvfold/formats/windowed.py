"""Segments whose tokens lie in another format as soon as they leave a window of the newest ones."""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.by_token import TokenSegment
from kvfold.formats.flat import Flat
from kvfold.formats.tailed import TailedSegment
from kvfold.pages import PagePool

C = TypeVar("C", bound=TokenSegment)


class WindowedSegment(TailedSegment[C]):
    """Tokens in a format that is addressed token by token, and behind them the newest as they are."""

    def _leave(self, tokens: Flat) -> None:
        """Tokens in the model's numbers go where they lie in the other format."""
        planes = dict(tokens.planes)
        for what in ("keys", "values"):
            planes |= self.coded.encode(what, planes[what])
        self.coded.table.add(tokens.counts, planes)

    def keep(self, mask: Tensor, columns: Mapping[str, Tensor], *, slack: bool = False) -> None:
        cut = self.coded.longest
        for part in self.parts:
            part.add_columns(columns)  # a plane takes room, too: before pages are asked for
        ends, wanted = [(0, cut), (cut, mask.shape[-1])], dict[PagePool, int]()
        marks = [mask[..., start:stop] & part.valid() for part, (start, stop) in zip(self.parts, ends, strict=True)]
        for part, stays in zip(self.parts, marks, strict=True):
            if part.shared:  # what stays is copied
                pages = -(-stays.flatten(0, 1).sum(-1).cpu().numpy() // part.pool.page_size)
                wanted[part.pool] = int(pages.max(initial=0)) * len(pages)
        self.ask(wanted)
        for part, stays, (start, stop) in zip(self.parts, marks, ends, strict=True):
            part.keep(stays, {name: column[..., start:stop] for name, column in columns.items()}, slack=slack)

    def amend(self, slots: Tensor, keys: Tensor | None, values: Tensor | None) -> None:
        """What is written over where tokens lie in the other format is brought into it."""
        cut = self.coded.longest
        older, newer = torch.where(slots < cut, slots, -1), torch.where(slots < cut, -1, slots - cut)
        if self.shared:  # a copy of a page for each of them, if it comes to that
            self.ask({part.pool: int((at >= 0).sum()) for part, at in zip(self.parts, (older, newer), strict=True)})
        for part, at in zip(self.parts, (older, newer), strict=True):
            part.amend(at, keys, values)

    def truncate(self, counts: np.ndarray, *, slack: bool = False) -> None:
        """The window is as much shorter; what left it stays as it is."""
        counts = np.minimum(counts, self.counts())
        older = np.minimum(counts, self.coded.counts())
        self.coded.truncate(older, slack=slack)
        self.tail.truncate(counts - older, slack=slack)

    @property
    def parts(self) -> tuple[TokenSegment, ...]:
        return self.coded, self.tail
