"""What a layer holds: its segments, counted, and read as one row of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.formats import POSITION, Chunk, Format, Segment, Spec, join
from kvfold.formats.parts import answers
from kvfold.layer.recent import Recent


class Segments:
    """The segments of one layer. New tokens of row b go to segment `opened[b]`; `Store` opens others."""

    def __init__(
        self, spec: Spec, segments: Sequence[tuple[Format, Segment]] = (), opened: np.ndarray | None = None,
        ordered: bool = True, recent: Recent | None = None,
    ):  # fmt: skip
        self.spec, self.segments = spec, list(segments)
        self.opened = np.zeros(spec.rows, dtype=np.int64) if opened is None else opened
        self.ordered = ordered  # whether each segment holds its tokens in the order of the text
        self.recent = recent  # what generated tokens asked, where a method acts at intervals
        self.first_ordered: bool | None = None  # whether the first does; None: nobody has looked since it may not

    def number(self, form: Format) -> int:
        """The place of the segment of this format among ours; an empty one is opened where there is none."""
        for place, (known, _) in enumerate(self.segments):
            if known == form:
                return place
        self.segments.append((form, form.open(replace(self.spec, rows=len(self.opened)))))
        return len(self.segments) - 1

    def of(self, form: Format) -> Segment:
        """The segment of this format."""
        return self.segments[self.number(form)][1]

    @property
    def lone_open(self) -> Segment | None:
        """The segment that all rows' new tokens go to, if it is one."""
        first = int(self.opened[0]) if len(self.opened) else 0
        return self.segments[first][1] if bool((self.opened == first).all()) else None

    @property
    def open(self) -> Segment:
        """The segment that the first row's new tokens go to."""
        return self.segments[int(self.opened[0])][1]

    def bytes_beside(self, counted: set[int]) -> int:
        """Bytes of all segments, without the pools that are `counted` (by id) already; ours are then, too."""
        beside = self.opened.nbytes + (0 if self.recent is None else self.recent.nbytes)
        return sum(segment.bytes_beside(counted) for _, segment in self.segments) + beside

    def row_nbytes(self) -> np.ndarray:
        """Bytes that each sequence's tokens take, (B,)."""
        none = np.zeros(len(self.opened)) if self.recent is None else self.recent.row_nbytes()
        total: np.ndarray = sum((segment.row_nbytes() for _, segment in self.segments), none)
        return total.astype(np.int64)

    @property
    def empty(self) -> bool:
        """No segment holds a token, or what became of one."""
        return not any(answers(segment) for _, segment in self.segments)

    def counts(self) -> np.ndarray:
        """Tokens of each (row, head), (B, H)."""
        if len(self.segments) == 1:
            return self.segments[0][1].counts()
        counts: np.ndarray = sum(segment.counts() for _, segment in self.segments)  # type: ignore[assignment]
        return counts

    def lengths(self) -> np.ndarray:
        """Slots of each (row, head) in what `tokens` gives, (B, H): where those are put in order there are no holes."""
        held = [segment for _, segment in self.segments if segment.longest]
        return held[0].lengths() if len(held) == 1 and self.ordered else self.counts()

    def laid(self) -> tuple[tuple[int, ...], tuple[Format, ...]]:
        """Where each segment's slots end, counted through all, and their formats."""
        ends = np.cumsum([segment.longest for _, segment in self.segments]).tolist()
        return tuple(ends), tuple(form for form, _ in self.segments)

    def tokens(self) -> tuple[Chunk, Int[Tensor, "B H T"] | None]:
        """All tokens in the order of the text, and where they lie (see `LayerView.order`)."""
        if len(self.segments) == 1 and self.ordered:
            return self.segments[0][1].dense(), None
        chunks = [segment.dense() for _, segment in self.segments if segment.longest]
        if not chunks:
            return self.segments[0][1].dense(), None
        tokens = join(chunks)
        if len(chunks) == 1 and self.ordered:
            return tokens, None
        last = torch.iinfo(torch.int32).max
        order = torch.argsort(tokens.positions.masked_fill(~tokens.valid, last), dim=-1, stable=True)
        return tokens.take(order), order

    @property
    def shows_own(self) -> bool:
        """Whether all rows' new tokens go to the first segment, whose tokens lie in the order of the text."""
        first = self.segments[0][1]
        if not self.ordered and self.first_ordered is None:
            self.first_ordered = in_order(*first.columns())
        return self.lone_open is first and (self.ordered or bool(self.first_ordered))

    def own(self) -> tuple[Chunk, Int[Tensor, "B H"]]:
        """Where it `shows_own`: the first segment's tokens, and how many lie elsewhere."""
        first = self.segments[0][1]
        return first.dense(), torch.from_numpy(self.counts() - first.counts()).to(self.spec.device)

    def newest(self, rows: Int[Tensor, " N"], name: str) -> Int[Tensor, " N"]:
        """The largest number of a column among the tokens of each of some rows, -1 where there is none."""
        most = torch.full((self.spec.rows,), -1, dtype=torch.int64)
        for _, segment in self.segments:
            valid, columns = segment.columns()
            if name in columns and valid.numel():
                most = torch.maximum(most, columns[name].masked_fill(~valid, -1).amax((1, 2)).cpu().long())
        return most[rows]

    def positions(self) -> list[list[list[int]]]:
        """Text positions of the tokens of each row and head, ascending."""
        tokens, _ = self.tokens()
        places, valid = tokens.positions.cpu(), tokens.valid.cpu()
        return [[places[b, h][valid[b, h]].tolist() for h in range(valid.shape[1])] for b in range(len(valid))]

    def slots(self) -> Int[Tensor, "B H T"] | None:
        """The how-manieth of the text each token is; None where they are stored in that order."""
        _, order = self.tokens()
        if order is None:
            return None
        return as_stored(torch.arange(order.shape[-1], device=order.device).expand_as(order), order)


def in_order(valid: Bool[Tensor, "B H T"], columns: Mapping[str, Tensor]) -> bool:
    """Whether tokens lie in the order of the text."""
    places = columns[POSITION].masked_fill(~valid, -1)
    return bool(((places == places.cummax(-1).values) | ~valid).all())


def as_stored(slots: Tensor, order: Tensor | None) -> Tensor:
    """Values for a view's slots, in the order in which the segments hold them; new slots stay behind."""
    if order is None:
        return slots
    old = slots[..., : order.shape[-1]]
    return torch.cat([torch.empty_like(old).scatter(-1, order, old), slots[..., order.shape[-1] :]], -1)


def new_tokens(
    k: Tensor, v: Tensor, valid: Bool[Tensor, "B Q"] | None, positions: Int[Tensor, "B Q"],
    labels: Mapping[str, Tensor] | None = None,
) -> Chunk:  # fmt: skip
    """Tokens that a pass brings, at these places in the text; `valid`: those that are not padding, None: all.

    `labels`: further columns of them (B, Q), the same in all heads.
    """
    columns = {POSITION: positions, **(labels or {})}
    wide = {name: column[:, None].expand(-1, k.shape[1], -1) for name, column in columns.items()}
    real = torch.ones((), dtype=torch.bool, device=k.device) if valid is None else valid[:, None]
    return Chunk(k.detach(), v.detach(), real.expand(wide[POSITION].shape), wide)
