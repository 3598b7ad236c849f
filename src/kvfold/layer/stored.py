"""What a layer stores: its segments, read and written as one row of tokens."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats import Chunk, DenseSegment, DepthSegment, Format, PagedSegment, Segment, join
from kvfold.rotation import Compact
from kvfold.views import LayerView


class Stored:
    """The segments of one layer. The first is dense and takes what is appended; `Store` opens others."""

    def __init__(self, segments: Sequence[tuple[Format, Segment]] = ()):
        self.segments = list(segments)

    @property
    def open(self) -> DenseSegment:
        """The segment that new tokens go to."""
        segment = self.segments[0][1]
        assert isinstance(segment, DenseSegment)
        return segment

    def bytes_beside(self, counted: set[int]) -> int:
        """Bytes of all segments, without the pools that are `counted` (by id) already; ours are then, too."""
        total = sum(segment.nbytes for _, segment in self.segments)
        pools = [segment.pool for _, segment in self.segments if isinstance(segment, PagedSegment)]
        total -= sum(pool.nbytes for pool in pools if id(pool) in counted)
        counted |= {id(pool) for pool in pools}
        return total

    @property
    def empty(self) -> bool:
        """No segment holds a token."""
        return all(segment.longest == 0 for _, segment in self.segments)

    def counts(self) -> np.ndarray:
        """Tokens of each (row, head), (B, H)."""
        counts: np.ndarray = sum(segment.counts() for _, segment in self.segments)  # type: ignore[assignment]
        return counts

    def lengths(self) -> np.ndarray:
        """Slots of each (row, head) in what `tokens` gives, (B, H): of several segments it has no holes."""
        lone = not any(segment.longest for _, segment in self.segments[1:])
        return self.open.table.lengths.reshape(-1, self.open.heads) if lone else self.counts()

    def tokens(self) -> tuple[Chunk, Int[Tensor, "B H T"] | None]:
        """All tokens in the order of the text, and where they lie (see `LayerView.order`)."""
        chunks = [segment.dense() for _, segment in self.segments if segment.longest]
        if len(chunks) < 2:
            return (chunks[0] if chunks else self.open.dense()), None
        tokens = join(chunks)
        last = torch.iinfo(torch.int32).max
        order = torch.argsort(tokens.positions.masked_fill(~tokens.valid, last), dim=-1, stable=True)
        return tokens.take(order), order

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

    def attend(
        self,
        q: Float[Tensor, "B H G Q D"],
        scale: float,
        compact: Compact | None,
        read: Tensor | None,
        weights: bool,
    ) -> tuple[Float[Tensor, "B H G Q Dv"], Float[Tensor, "B H G Q"], Float[Tensor, "B H G Q T"] | None]:
        """(out, lse) over all segments, merged; `weights` (see `Segment.attend`) are those of a lone one."""
        parts, start, left = [], 0, None
        for _, segment in self.segments:
            stop = start + segment.longest
            here = None if read is None else read[..., start:stop]
            turn = None if compact is None else compact.of(start, stop)
            out, lse, left = segment.attend(q, scale, read=here, compact=turn, weights=weights)
            parts.append((out, lse))
            start = stop
        return *ops.merge(parts), left

    def commit(self, view: LayerView, new: Chunk | None, *, slack: bool = False) -> None:
        """Hold what the view says. `new`: its last slots are not stored yet. `slack`: see `Segment.keep`."""
        tokens, homes = view.tokens, view.formats
        staying = tokens.valid.clone() if homes else tokens.valid
        for _, mask in homes:
            staying &= ~mask
        if homes:  # what `keep` is about to overwrite
            columns = {name: column.clone() for name, column in tokens.columns.items()}
            tokens = Chunk(tokens.keys.clone(), tokens.values.clone(), tokens.valid, columns)
        # What is not stored yet, or in a format that is not written token by token, is written with the rest.
        in_place = new is None and not any(segment.longest for _, segment in self.segments[1:])
        if view.rewritten or (view.amended and not in_place):
            self._replace(tokens, staying)
        else:
            for amend in view.amended:
                self.open.amend(amend.slots, amend.keys, amend.values)
            self._keep(view, staying, slack)
            if new is not None:
                start = staying.shape[-1] - new.valid.shape[-1]
                columns = {name: column[..., start:] for name, column in tokens.columns.items()}
                self.open.append(new.but(staying[..., start:], columns))
        for form, mask in homes:
            home = next((s for f, s in self.segments[1:] if f == form), None)
            if home is None:
                home = form.segment(tokens)
                self.segments.append((form, home))
            home.append(tokens.but(tokens.valid & mask))

    def _replace(self, tokens: Chunk, staying: Tensor) -> None:
        tokens = Chunk(tokens.keys, tokens.values, staying, tokens.columns)  # looked at before it is cleared
        shared = [(form, segment) for form, segment in self.segments if isinstance(segment, DepthSegment)]
        for _, segment in self.segments:
            segment.drop_tokens() if isinstance(segment, DepthSegment) else segment.clear()
        self.segments = [self.segments[0], *shared]  # what was gone through for tokens to share, and what it told
        self.open.append(tokens)

    def _keep(self, view: LayerView, staying: Tensor, slack: bool) -> None:
        keep = as_stored(staying, view.order)
        columns = {name: as_stored(view.columns[name], view.order) for name in view.changed}
        start = 0
        for _, segment in self.segments:
            stop = start + segment.longest
            if stop > start:
                here = {name: column[..., start:stop] for name, column in columns.items()}
                segment.keep(keep[..., start:stop], here, slack=slack)
            start = stop

    def unfold(self) -> None:
        """Hold everything in the first segment, as it is read."""
        tokens, _ = self.tokens()
        self._replace(tokens, tokens.valid)

    def drop_from(self, limit: Int[Tensor, "B 1 1"]) -> None:
        """Drop the tokens whose text position is `limit` or later."""
        for _, segment in self.segments:
            if isinstance(segment, DepthSegment):
                segment.upto = np.minimum(segment.upto, limit.flatten().cpu().numpy())
            if segment.longest:
                stored = segment.dense()
                stays = stored.valid & (stored.positions < limit)
                if bool((stays == (stored.valid & (stored.valid.cumsum(-1) <= stays.sum(-1, keepdim=True)))).all()):
                    segment.truncate(stays.sum(-1).cpu().numpy(), slack=True)
                else:  # tokens that `Store` moved here did not come in the order of the text
                    segment.keep(stays, {})

    def select(self, rows: np.ndarray) -> None:
        """Row i becomes what row `rows[i]` was; pages are shared until one of the sharers writes."""
        chosen = [(form, segment.select(rows)) for form, segment in self.segments]
        for (_, old), (_, new) in zip(self.segments, chosen, strict=True):
            old.clear()
            new.compact()
        self.segments = chosen

    def fork(self, batch: int) -> "Stored":
        """The same over the same pages."""
        return Stored([(form, segment.select(np.arange(batch))) for form, segment in self.segments])

    def clear(self) -> None:
        """Drop everything."""
        for _, segment in self.segments:
            segment.clear()


def as_stored(slots: Tensor, order: Tensor | None) -> Tensor:
    """Values for a view's slots, in the order in which the segments hold them; new slots stay behind."""
    if order is None:
        return slots
    old = slots[..., : order.shape[-1]]
    return torch.cat([torch.empty_like(old).scatter(-1, order, old), slots[..., order.shape[-1] :]], -1)
