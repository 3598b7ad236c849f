"""What a layer stores: segments that are attended over, written, cut and chosen. Knows no method."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.formats import POSITION, Chunk
from kvfold.formats.index import Handed
from kvfold.formats.parts import Answer, Choosing, answers, attend_parts, merged
from kvfold.formats.segment import Folding
from kvfold.layer.recent import Recent
from kvfold.layer.segments import Segments, new_tokens
from kvfold.rotation import Compact


class Stored(Segments):
    """A layer's segments, and what is done to all of them."""

    def attend(
        self, q: Float[Tensor, "B H G Q D"], scale: float, compact: Compact | None, read: Tensor | None, weights: bool,
        handed: Handed | None = None,
    ) -> Answer:  # fmt: skip
        """(out, lse) over all segments, merged; `weights` (see `Segment.attend`) of all their slots.

        `handed`: segments that choose what of them is read do so, and hand it on there; None: all is read.
        """
        parts = [segment for _, segment in self.segments]
        return attend_parts(parts, q, scale, read, compact, weights=weights, handed=handed)

    def step(
        self, q: Float[Tensor, "B H G 1 D"], k: Tensor, v: Tensor, positions: Int[Tensor, "B 1"], scale: float,
        weights: bool, handed: Handed, own: bool = False,
    ) -> Answer:  # fmt: skip
        """One generated token a row: stored, and all that is stored attended over.

        `own`: it `shows_own`, and weights are wanted of the first segment's slots alone.
        """
        alone = len(self.segments) == 1
        opened, parts = self.segments[0][1] if alone else self.lone_open, list[Answer]()
        if opened is None:
            self.append(new_tokens(k, v, None, positions), even=True)
        for _, segment in self.segments:
            if isinstance(segment, Choosing):
                if segment is opened:
                    parts.append(segment.step_few(q, k, v, positions, scale, weights=weights, handed=handed))
                elif answers(segment):
                    parts.append(segment.attend_few(q, scale, weights=weights and not own, handed=handed))
            elif segment is opened:
                parts.append(segment.step(q, k, v, positions, scale, weights=weights))
            elif answers(segment):
                parts.append(segment.attend(q, scale, weights=weights and not own))
        return parts[0] if alone else merged(parts, weights=weights, first=own)

    def append(self, chunk: Chunk, *, even: bool = False) -> None:
        """Add the chunk's valid tokens to the segments that are open for their rows; `even`: all are valid."""
        own = self.lone_open
        if own is not None:
            own.append(chunk, even=even)
            return
        for number in np.unique(self.opened):
            ours = torch.from_numpy(self.opened == number).to(chunk.valid.device)[:, None, None]
            self.segments[number][1].append(chunk.but(chunk.valid & ours))

    def unfold(self) -> None:
        """Hold everything in the open segments, as it is read."""
        tokens, _ = self.tokens()
        tokens = Chunk(tokens.keys.clone(), tokens.values.clone(), tokens.valid.clone(), dict(tokens.columns))
        for _, segment in self.segments:
            segment.drop_tokens()
        self.append(tokens)
        self.ordered = True

    def check_cropped(self, limit: np.ndarray) -> None:
        """Raise ValueError where tokens whose text position is `limit` (B,) or later can't be dropped."""
        for form, segment in self.segments:
            if form.traits.crops == "never":
                raise ValueError(f"{form} can't take tokens back")
            if isinstance(segment, Folding):
                segment.check_cropped(limit)

    def drop_from(self, limit: np.ndarray) -> None:
        """Drop the tokens whose text position is `limit` (B,) or later."""
        if self.recent is not None:
            self.recent.drop_from(limit)
        for _, segment in self.segments:
            segment.cropped(limit)
            if segment.longest:
                valid, columns = segment.columns()
                first = torch.from_numpy(limit).to(valid.device)[:, None, None]
                stays = valid & (columns[POSITION] < first)
                if bool((stays == (valid & (valid.cumsum(-1) <= stays.sum(-1, keepdim=True)))).all()):
                    segment.truncate(stays.sum(-1).cpu().numpy(), slack=True)
                else:  # tokens that were moved here did not come in the order of the text
                    segment.keep(stays, {})

    # -- the cache operations --------------------------------------------------------------------------------

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; pages are shared until one of the sharers writes."""
        chosen = [(form, segment.select(rows)) for form, segment in self.segments]
        for (_, old), (_, new) in zip(self.segments, chosen, strict=True):
            old.clear()
            new.compact()
        self.segments, self.opened = chosen, self.opened[rows]
        self.recent = None if self.recent is None else self.recent.select(rows)
        self.spec = replace(self.spec, rows=len(rows))

    def check_join(self, other: "Stored") -> None:
        """Raise ValueError where `join` would: what was measured under one name is not the same of both."""
        for key in self.spec.artefact.keys() & other.spec.artefact.keys():
            mine, theirs = (getattr(spec.artefact[key], "digest", None) for spec in (self.spec, other.spec))
            if mine != theirs:
                raise ValueError(f"other's rows have keys in another basis: {key!r} was measured anew")

    def join(self, other: "Stored") -> None:
        """Take the rows of another batch behind ours; `other` is used up. Formats that one of us lacks are opened."""
        mine, theirs = len(self.opened), len(other.opened)
        self.recent = Recent.joined(self.recent, other.recent, (mine, theirs))
        known = {**other.spec.artefact, **self.spec.artefact}
        self.spec, other.spec = (replace(spec, artefact=known) for spec in (self.spec, other.spec))
        places = [self.number(form) for form, _ in other.segments]
        for form, _ in self.segments:
            other.number(form)
        for form, segment in self.segments:
            segment.join(other.of(form))
        self.opened = np.concatenate([self.opened, np.array(places, dtype=np.int64)[other.opened]])
        self.spec, self.ordered = replace(self.spec, rows=mine + theirs), self.ordered and other.ordered
        self.first_ordered = None

    def fork(self) -> "Stored":
        """The same over the same pages."""
        everyone = np.arange(len(self.opened))
        segments = [(form, segment.select(everyone)) for form, segment in self.segments]
        recent = None if self.recent is None else self.recent.select(everyone)
        return Stored(self.spec, segments, self.opened, self.ordered, recent)

    def clear(self) -> None:
        """Drop everything."""
        for _, segment in self.segments:
            segment.clear()
        self.ordered, self.recent = True, None
