"""A generated token that is written, chooses and reads in one operation, where bounds or keys are all it goes by."""

from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats.dense import DenseSegment
from kvfold.formats.index import ByBounds, ByKeys, Compiled, Handed, Remembered
from kvfold.formats.parts import Answer, Choosing
from kvfold.formats.segment import Segment
from kvfold.formats.tokens import POSITION

PLAIN = {"keys", "values", POSITION}
"""Planes of tokens that have nothing beside."""
SEEN: list[Callable[..., None]] = []
"""Who is told of every choice, see `kvfold.formats.indexed.choices_seen`: then a step is done part by part."""


class AtOnce(Choosing):
    """What a segment with an index does at once, and else as ever: what is read, and held then, is the same."""

    form: Any
    inner: Segment
    index: Remembered
    seen: Int[np.ndarray, " B"]

    def attend_at_once(self, q: Tensor, scale: float, counts: Int[np.ndarray, "B H"]) -> Answer | None:
        """What bounds alone choose among so many tokens, read; None where there is more to it."""
        chooser: Compiled | None = self.form.compiled
        by = None if chooser is None else chooser.by_bounds(self.index, counts, self.seen)
        return None if by is None else attend_by_bounds(self.inner, q, scale, by, self.form.selection.unit)

    def step_few(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, weights: bool, handed: Handed
    ) -> Answer:  # fmt: skip
        """See `Choosing.step_few`; all of it at once where a kernel chooses among tokens with nothing beside."""
        chooser: Compiled | None = self.form.compiled
        inner, unit = self.inner, self.form.selection.unit
        if chooser is not None and not (weights or SEEN) and steps_at_once(inner):
            seen = np.maximum(self.seen, positions[:, 0].cpu().numpy().astype(np.int64) + 1)
            goes_by, answer = (self.index, inner.counts() + 1, seen), None
            if _lies_in_units(inner, unit) and (bounds := chooser.by_bounds(*goes_by)) is not None:
                answer = step_by_bounds(inner, q, k, v, positions, scale, bounds, unit)
            elif (keys := chooser.by_keys(*goes_by)) is not None and ops.steps_keys(q[:, :, :, 0], inner.table, keys):
                answer = step_by_keys(inner, q, k, v, positions, scale, keys, seen)
            if answer is not None:
                self.seen = seen
                return answer
        return super().step_few(q, k, v, positions, scale, weights=weights, handed=handed)


def attend_by_bounds(
    segment: Segment, q: Float[Tensor, "B H G 1 D"], scale: float, by: ByBounds, unit: int
) -> Answer | None:
    """`attend_few` of what bounds choose, in one operation; None where tokens don't lie as that wants them."""
    if not isinstance(segment, DenseSegment) or not _lies_in_units(segment, unit):
        return None
    out, lse = ops.attend_units(
        q[:, :, :, 0], by.held, segment.table, by.room, scale, unit=unit, heads=by.heads, sinks=by.sinks,
        recent=by.recent, mass=segment.mass,
    )  # fmt: skip
    return out[:, :, :, None], lse[..., None], None


def steps_at_once(segment: Segment) -> TypeGuard[DenseSegment]:
    """Whether a kernel can add a token to it and read it."""
    return isinstance(segment, DenseSegment) and segment.table.pool.specs.keys() == PLAIN and _lies_here(segment)


def step_by_bounds(
    segment: DenseSegment, q: Float[Tensor, "B H G 1 D"], k: Float[Tensor, "B H 1 D"], v: Float[Tensor, "B H 1 Dv"],
    positions: Int[Tensor, "B 1"], scale: float, by: ByBounds, unit: int,
) -> Answer:  # fmt: skip
    """A token for each row, its unit's bounds, and what those then choose and read, in one operation."""
    out, lse = ops.step_units(
        q[:, :, :, 0], segment.table, segment.token(k, v, positions), by.held, by.room, scale, unit=unit,
        heads=by.heads, sinks=by.sinks, recent=by.recent,
    )  # fmt: skip
    return out[:, :, :, None], lse[..., None], None


def step_by_keys(
    segment: DenseSegment, q: Float[Tensor, "B H G 1 D"], k: Float[Tensor, "B H 1 D"], v: Float[Tensor, "B H 1 Dv"],
    positions: Int[Tensor, "B 1"], scale: float, by: ByKeys, seen: Int[np.ndarray, " B"],
) -> Answer:  # fmt: skip
    """A token for each row, its key in the index, and what votes on keys then choose and read, in one operation."""
    out, lse = ops.step_keys(q[:, :, :, 0], segment.table, segment.token(k, v, positions), by, seen, scale)
    return out[:, :, :, None], lse[..., None], None


def _lies_in_units(segment: DenseSegment, unit: int) -> bool:
    """Whether units are whole pages in memory."""
    return not unit % segment.table.pool.page_size and _lies_here(segment)


def _lies_here(segment: DenseSegment) -> bool:
    """Whether its pages are in memory, which a kernel reads, without holes: what is elsewhere must be brought first."""
    pool = segment.table.pool
    return not segment.table.holed and pool.memory is None and pool.device.type == "cpu"
