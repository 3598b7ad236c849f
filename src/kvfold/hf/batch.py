"""The rows of a cache: taken back from the end, chosen, joined by those of another, let go."""

from collections.abc import Sequence
from operator import index

import numpy as np
import torch
from torch import Tensor

from kvfold.formats import POSITION
from kvfold.hf.beside import check_join, is_empty, join_layers, row_nbytes, select_rows
from kvfold.hf.call.given import Given
from kvfold.hf.call.hooks import watch
from kvfold.hf.call.host import Host
from kvfold.hf.layers import PagedLayer, WindowLayer
from kvfold.layer.rows import check_most
from kvfold.options import check_rows, shown


class Batch(Host):
    """The operations of a cache that go through all of its layers, and their rows."""

    def reset(self) -> None:
        """Forget everything that was read."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row, then run what waited for it."""
        try:
            count = index(tokens_to_remove)  # a tensor from transformers before 5.17
        except TypeError:
            raise ValueError(
                f"tokens_to_remove={shown(tokens_to_remove)} must be an int: minus the tokens to take back"
            ) from None
        drop = -count if count <= 0 else max(0, self.get_seq_length() - count)
        for core in self.paged if drop else ():
            try:
                core.stored.check_cropped(self.rows.before(drop))
            except ValueError as error:
                raise ValueError(f"crop({count}): {error}") from None
        reading = None if self.reading is None else self.reading.drop(drop)
        for layer in self.layers:  # those first that may refuse, when nothing has changed yet
            if not isinstance(layer, PagedLayer):
                layer.crop(-drop)
        width, self.reading, self.given = self.rows.width, reading, self.given.drop(drop)
        self.rows.drop(drop)
        for core in self.paged if drop else ():
            core.drop_from(self.rows.seen)
        if drop and self.paged:  # windows that hold some of a narrowed text know by its positions where it ends
            for layer in self.layers:
                if isinstance(layer, WindowLayer):
                    layer.end_at(torch.from_numpy(self.rows.seen))
        self.settled(self.pending.crop(self.paged, width - self.rows.width))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of text given so far, padding counted, as transformers counts them."""
        return self.get_query_offset(layer_idx) + (0 if self.reading is None else self.reading.surplus)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns that a layer has read: where masks begin to count."""
        return int(super().get_seq_length(layer_idx))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        self._rows_are(beam_idx.cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        check_most(self.rows, repeats * self.rows.batch)
        super().batch_repeat_interleave(repeats)
        self._rows_are(np.repeat(np.arange(self.rows.batch), repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        check_most(self.rows, len(indices) if indices.dtype != torch.bool else int(indices.sum()))
        super().batch_select_indices(indices)
        self._rows_are(np.arange(self.rows.batch)[indices.cpu().numpy()])

    def _rows_are(self, chosen: np.ndarray) -> None:
        """The layers' rows are now those; so is what they have read."""
        if self.rows.batch:
            self.rows.select(chosen)
        rows = torch.from_numpy(chosen)
        self.reading, self.given = self.reading and self.reading.select(rows), self.given.select(rows)

    def join(self, other: "Batch") -> None:
        """Take the rows of another cache of this model behind ours, with the methods that decide about them.

        From then on a forward pass reads both: columns end at the same place, so the attention mask of a row that has
        read less has padding in front, and a row's answers are what it would have given alone. `other` is empty
        afterwards. Raises ValueError, before anything is changed, for a cache of another model, this one itself, more
        rows than `memory` was given for, methods whose layers share memory (minicache) or that gave the model other
        tokens than the caller's (specpc), and a calibration that was measured anew between the two.
        """
        if other is self or other.model is not self.model:
            raise ValueError(f"other={type(other).__name__} must be another cache of this {type(self.model).__name__}")
        for cache in (self, other):
            cache.settle_pending()
            for group in cache.rows.groups:
                if group.method.shares_layers:
                    raise ValueError(f"method={group.method} lets layers share memory: its rows can't join others")
            if cache.reading is not None:
                raise ValueError(f"method={cache.method} chose what of its text was read: its rows can't join others")
        if self.arena is not other.arena:
            raise ValueError("other's pages come out of another arena than ours: rows keep theirs")
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, PagedLayer):
                mine.core.check_join(theirs.core)
            else:
                check_join(mine, theirs)
        if not other.rows.batch:
            return
        check_most(self.rows, self.rows.batch + other.rows.batch)
        fresh, self.given = not self.rows.batch, Given()  # from now on nobody knows which columns are whose
        for cache in (self, other):
            cache.name_columns()
        for place, (mine, theirs) in enumerate(zip(self.layers, other.layers, strict=True)):
            if isinstance(mine, PagedLayer):
                mine.core.join(theirs.core)
                mine.is_initialized = True
            elif fresh:
                self.layers[place] = theirs
            elif not is_empty(mine):
                join_layers(mine, theirs)
        self.rows.join(other.rows)
        for core in self.paged:
            core.number = self.rows.number
        for group in self.rows.groups:
            watch(self.model, group.method)
        other.reset()

    def retire(self, rows: Sequence[int]) -> None:
        """Let rows of the batch go; what they alone held is free. The others move up. See `take` to keep them."""
        gone = self._checked(rows)
        left = np.setdiff1d(np.arange(self.rows.batch), gone)
        self.settle_pending()
        if len(left):
            self._choose(left)
        else:
            self.reset()

    def _checked(self, rows: Sequence[int]) -> np.ndarray:
        return np.array(check_rows(rows, self.rows.batch), dtype=np.int64)

    def _choose(self, chosen: np.ndarray) -> None:
        """Row i becomes what row `chosen[i]` was, in every layer."""
        for layer in self.layers:
            if isinstance(layer, PagedLayer):
                layer.core.select(chosen)
            else:
                select_rows(layer, chosen)
        self._rows_are(chosen)

    def row_nbytes(self) -> list[int]:
        """Bytes that each row of the batch takes: its pages, its windows, its recurrent states."""
        batch = self.rows.batch
        held = [
            layer.core.stored.row_nbytes() if isinstance(layer, PagedLayer) else row_nbytes(layer, batch)
            for layer in self.layers
        ]
        total: list[int] = np.sum(held, axis=0).tolist() if batch else []
        return total

    def name_columns(self) -> None:
        """Note which columns the methods of the rows have set; what other methods set later is not theirs."""
        if len(self.rows.groups) == 1:
            found = {name for core in self.paged for _, segment in core.segments for name in segment.columns()[1]}
            self.rows.remember(0, frozenset(found) - {POSITION})

    def activate_past_recording(self) -> None:
        """Assisted decoding will crop after each pass: events wait until it has."""
        self.settle_pending()  # of an assisted decoding before this one
        super().activate_past_recording()
        self.pending.record()

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward pass."""
        return self.rows.batch or -1

    @property
    def text_tokens(self) -> int | None:
        """Tokens of text given, where the method chose what of it was read."""
        return None if self.reading is None else int(self.reading.given.sum())
