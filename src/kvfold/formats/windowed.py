"""Segments whose tokens lie in another format as soon as they leave a window of the newest ones."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kvfold.formats.by_token import TokenSegment
from kvfold.formats.flat import Flat
from kvfold.formats.tailed import TailedSegment
from kvfold.formats.tokens import Chunk
from kvfold.pages import PagePool
from kvfold.pages.rows import spans

C = TypeVar("C", bound=TokenSegment)


class WindowedSegment(TailedSegment[C]):
    """Tokens in a format that is addressed token by token, and behind them the newest as they are.

    As soon as a row has `residual + group` tokens in the window, the oldest `group` of them leave it.
    """

    @property
    @abstractmethod
    def residual(self) -> int:
        """Tokens that stay in the window, at least."""

    @property
    @abstractmethod
    def group(self) -> int:
        """Tokens that leave it together; a multiple of the tail's tokens a page."""

    def pages_for(self, more: np.ndarray) -> dict[PagePool, int]:
        moved = self._moved(more)
        beyond = np.maximum(moved - self.tail.counts(), 0)
        # A row whose window is passed by begins a page where it had a part of one.
        tail = self.tail.table.pages_for((more - beyond).reshape(-1)) + int((beyond > 0).sum())
        if self.tail.table.holed and self.tail.shared:  # holes are closed first, on pages of its own
            tail += int(self.tail.table.needed.sum()) + self.tail.table.rows
        return {self.coded.pool: self.coded.table.pages_for(moved.reshape(-1)), self.tail.pool: tail}

    def _moved(self, more: np.ndarray) -> np.ndarray:
        """Tokens that leave the window when so many more come, (B, H)."""
        over = self.tail.counts() + more - self.residual
        moved: np.ndarray = np.maximum(over // self.group, 0) * self.group
        return moved

    def _front(self, counts: np.ndarray) -> Flat:
        """The first so many tokens of each row's window, which then has no holes."""
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
        beyond = torch.from_numpy(moved - old.counts.reshape(moved.shape)).to(chunk.valid.device)
        now = chunk.valid & (chunk.valid.cumsum(-1) <= beyond[..., None])
        states = {"keys": chunk.keys[now].to(self.tail.compute), "values": chunk.values[now].to(self.tail.compute)}
        new = Flat(beyond.reshape(-1).cpu().numpy(), states | {name: x[now] for name, x in chunk.columns.items()})
        self._leave(old.then(new))
        first = np.arange(self.tail.table.table.shape[1]) * self.tail.pool.page_size
        self.tail.table.drop_pages(first < old.counts[:, None])
        self.tail.append(chunk.but(chunk.valid & ~now))

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


def parts_of(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What a state has of the tokens that left the window, and of those in it. ValueError for what is of neither."""
    strange = sorted(name for name in tensors if name.partition(".")[0] not in ("coded", "tail"))
    if strange:
        raise ValueError(f"tensors: {strange[0]!r} must begin with 'coded.' or 'tail.'")
    return [{n.removeprefix(p): x for n, x in tensors.items() if n.startswith(p)} for p in ("coded.", "tail.")]
