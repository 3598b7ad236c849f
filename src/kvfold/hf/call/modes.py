"""How forward passes are taken within a block: observed, undecided, as parts of a prompt, without a trace."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from transformers import Cache as HFCache

from kvfold.hf.call.call import Call
from kvfold.hf.call.given import Given
from kvfold.hf.call.pending import Pending
from kvfold.hf.call.reading import Reading
from kvfold.hf.fast import Spilled
from kvfold.hf.layers import PagedLayer, WindowLayer
from kvfold.hf.tables import kept_tables
from kvfold.layer.layer import KVLayer
from kvfold.layer.rows import Rows
from kvfold.options import LARGEST, check_rows
from kvfold.pages import Arena
from kvfold.views import LayerView


@dataclass(frozen=True)
class Mode:
    """How forward passes are taken; another one holds within a block, and a fork begins with this one."""

    listening: bool = True
    """Whether events run."""
    prefilling: bool | tuple[int, ...] = False
    """Whether each pass reads a part of the prompt; or which rows do, while the others read generated tokens."""
    observe: Callable[[LayerView], None] | None = None
    """Called with each layer's view, before any decision."""
    parts: bool = False
    """Whether calls of the model are parts of one whose arguments are final."""
    progress: Callable[[float], None] | None = None
    """Called with the share of a long prompt that is read."""
    whole: bool = False
    """Whether a call is read at once, whatever the cache's `prefill_chunk`."""


class Modal(HFCache):
    """The state of a cache and of the call in hand, and the blocks in which passes are taken otherwise."""

    layers: list[Any]
    model: Any
    prefill_chunk: int | None
    part_size: int | None
    """Tokens of the parts in which a layer reads a long prompt; None: as the device says; 0: all at once."""
    arena: Arena | None
    """What its pages come out of; None: they are the cache's own."""
    spilled: Spilled | None = None
    """What brings its pages from a disk; None: they are in memory."""
    rows: Rows
    paged: list[KVLayer]
    """The layers whose tokens are on pages, in order."""
    mode: Mode
    call: Call
    """The call of the model in hand."""
    pending: Pending
    given: Given
    """The ids of the text that it was given, as far as they are known."""
    reading: Reading | None
    """Where a method gave the model other tokens to read than the caller did."""

    def settle_pending(self) -> None:
        """Run the events that still wait."""
        raise NotImplementedError

    def stop_recording(self) -> None:
        """Assisted decoding is over."""
        raise NotImplementedError

    @contextmanager
    def within(self, **changes: Any) -> Iterator[None]:
        """Another mode within the block."""
        before, self.mode = self.mode, replace(self.mode, **changes)
        try:
            yield
        finally:
            self.mode = before

    @contextmanager
    def tentative(self, observe: Callable[[LayerView], None] | None = None) -> Iterator[None]:
        """Forward passes inside the block leave no trace: no event runs, and what they appended is taken back.

        `observe` gets every layer's view, with the queries of the pass: a draft's look-ahead, a patched prompt.
        """
        rows, marks = self.rows.mark(), [core.mark() for core in self.paged]
        others = [None if isinstance(x, PagedLayer) else copy.deepcopy(x) for x in self.layers]
        given, call, reading, pending = self.given, self.call, self.reading, self.pending
        self.call, self.pending = Call(), Pending()  # nobody crops what leaves no trace
        try:
            with kept_tables(self.model), self.within(listening=False, observe=observe):
                yield
        finally:
            self.given, self.call, self.reading, self.pending = given, call, reading, pending
            self.rows.rewind(rows)
            for core, mark in zip(self.paged, marks, strict=True):
                core.rewind(mark)
            self.layers = [old if old is not None else new for old, new in zip(others, self.layers, strict=True)]
            for layer in self.layers:
                if isinstance(layer, WindowLayer):
                    layer.compact()

    @contextmanager
    def aside(self, observe: Callable[[LayerView], None] | None = None) -> Iterator[None]:
        """Passes that leave no trace, each in one piece."""
        with self.within(whole=True, progress=None), self.tentative(observe):
            yield

    def prefilling(self, rows: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Every forward pass inside the block reads a part of the prompt, also one of a single token.

        Outside it one token counts as generated, unless the cache is empty. For prompts that are read in chunks.
        `rows`: those of the batch that do; the others read a generated token beside it, and padding before that.
        Raises ValueError for rows that the batch does not have.
        """
        return self.within(prefilling=True if rows is None else check_rows(rows, self.rows.batch or LARGEST))

    def undecided(self) -> AbstractContextManager[None]:
        """Forward passes inside the block append, and no event runs: a method that acts in decoding lets it be."""
        return self.within(listening=False)

    def observed(self, observe: Callable[[LayerView], None]) -> AbstractContextManager[None]:
        """Within the block `observe` gets every layer's view, before the method decides."""
        return self.within(observe=observe)

    def progressing(self, progress: Callable[[float], None]) -> AbstractContextManager[None]:
        """Within the block `progress` gets the share (0 to 1) of a prompt that is read, if that is read in parts."""
        return self.within(progress=progress)

    def tell(self, share: float) -> None:
        """A layer has read so much of the prompt."""
        if self.mode.progress is not None:
            self.mode.progress(min(1.0, (self.call.through + share) / len(self.layers)))
