"""The cache that goes to `model.generate(past_key_values=...)`."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache as HFCache
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvfold.hf.anatomy import attention_modules
from kvfold.hf.call.call import Begun, greedy_of
from kvfold.hf.call.hooks import use_kvfold, watch
from kvfold.hf.call.rewriting import Reading
from kvfold.hf.layers import PagedLayer, WindowLayer, crop_layers, held_bytes, storage_bytes
from kvfold.hf.prompt import Prompt
from kvfold.hf.report import Report, layer_report
from kvfold.hf.rope import find_rope
from kvfold.hf.support import check_model
from kvfold.layer.late import Done, carry_out
from kvfold.layer.layer import KVLayer
from kvfold.layer.plan import Pass
from kvfold.methods.base import Decisions, Method
from kvfold.methods.registry import parse
from kvfold.options import check_int
from kvfold.views import Images, LayerView, answered


class Cache(HFCache):
    """A transformers cache that holds its tokens on pages and lets a method decide which.

    `method` is a slug, a composition as text, or a Method; `options` go to the method. Sets the model's attention
    implementation to "kvfold", which without this cache computes what "sdpa" does. Sliding-window layers keep
    their window and linear-attention layers their state: no method sees them. With `prefill_chunk` the model reads
    longer inputs in chunks of so many tokens, and the method decides after each: no layer ever holds more than its
    budget and a chunk (the answer is then not that of one pass, but for `full`; see docs/architecture.md).

    Raises ValueError for a model that can't work, naming what is missing, and for options that don't fit.
    """

    layers: list[Any]

    def __init__(
        self, model: PreTrainedModel, method: str | Method = "full", *, prefill_chunk: int | None = None, **options: Any
    ):
        self.method = parse(method, **options)
        if prefill_chunk is not None:
            check_int("prefill_chunk", prefill_chunk, 2)
        check_model(model, self.method)
        self.model, self.prefill_chunk = model, prefill_chunk
        self.recording, self.parts, self.listening, self._prefilling, self._at = False, False, True, False, -1
        self._images: Images | None = None  # which tokens of the pass stand for images
        self.unread: PagedLayer | None = None
        self._chunks: tuple[nn.Module, list[Tensor]] | None = None  # a call that was split, the outputs so far
        self._pass: Pass | None = None
        self._begun: Begun | None = None  # a call of the model that is not over
        self._token_ids: Tensor | None = None
        self._mask: Tensor | None = None
        self.reading: Reading | None = None  # where a method gave the model other tokens to read than the caller did
        self._unheard: Pass | None = None  # a prompt's pass that is over, and whose `after_prompt` is not
        self._observe: Callable[[LayerView], None] | None = None
        super().__init__(layers=self._layers())
        if not self.paged:
            warnings.warn(
                f"{type(model).__name__} has no layer with full attention: {self.method} has nothing to do",
                stacklevel=2,
            )
        use_kvfold(model)
        watch(model, self.method)

    def _layers(self) -> list[Any]:
        config = self.model.config.get_text_config(decoder=True)
        plan = DynamicCache(config=config).layers
        paged = tuple(index for index, layer in enumerate(plan) if type(layer) is DynamicLayer)
        self.method = self.method.bind(self.model) if paged else self.method
        modules = attention_modules(self.model)
        layers: list[Any] = []
        for index, layer in enumerate(plan):
            if type(layer) is DynamicLayer:
                rope = find_rope(self.model, modules.get(index), "full_attention")
                if self.method.compact and rope is None:
                    raise ValueError(
                        f"method={self.method} needs RoPE with fixed angles to move tokens; "
                        f"{type(self.model).__name__} has none that it could use in layer {index}"
                    )
                core = KVLayer(self.method, index, paged, len(plan), rope)
                layers.append(PagedLayer(self, core))
            elif type(layer) is DynamicSlidingWindowLayer:
                layers.append(WindowLayer(sliding_window=layer.sliding_window))
            else:
                layers.append(layer)
        return layers

    # -- what a user reads -----------------------------------------------------------------------------------

    @property
    def paged(self) -> list[KVLayer]:
        """The layers whose tokens are on pages, in order."""
        return [layer.core for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held: pages with their columns and tables, windows, recurrent states."""
        return sum(held_bytes(self.layers))

    @property
    def dense_nbytes(self) -> int:
        """Bytes that a dense cache would hold for the same tokens (padding not counted, windows as they are)."""
        return sum(
            layer.core.dense_bytes(self.text_tokens) if isinstance(layer, PagedLayer) else storage_bytes(layer)
            for layer in self.layers
        )

    @property
    def kept_tokens(self) -> float:
        """Tokens held per KV head, a mean over the paged layers, rows and heads."""
        self.settle_pending()
        counts = [layer.counts().mean() for layer in self.paged if layer.width]
        return float(sum(counts) / len(counts)) if counts else 0.0

    def kept(self, layer: int) -> list[list[list[int]]]:
        """Text positions that model layer `layer` holds: kept[row][kv_head], ascending, padding not counted.

        Raises ValueError for a layer that is not on pages.
        """
        self.settle_pending()
        if not 0 <= layer < len(self.layers) or not isinstance(self.layers[layer], PagedLayer):
            paged = [core.layer for core in self.paged]
            raise ValueError(f"layer={layer} is not one of the layers with full attention: {paged}")
        found: list[list[list[int]]] = self.layers[layer].core.kept()
        if self.reading is not None:
            return [[self.reading.in_text(row, head) for head in heads] for row, heads in enumerate(found)]
        return found

    def report(self) -> Report:
        """Tokens and bytes of each layer; prints as a table."""
        self.settle_pending()
        return layer_report(self)

    # -- forward passes --------------------------------------------------------------------------------------

    def reads_prompt(self, tokens: int, ordinal: int = 0) -> bool:
        """Whether a pass over so many tokens would count as a prompt, not as generated ones."""
        return tokens > 1 or self.paged[ordinal].width == 0 or self._prefilling

    @property
    def text_tokens(self) -> int | None:
        """Tokens of text given, where the method chose what of it was read."""
        return None if self.reading is None else int(self.reading.given.sum())

    def enter(self, ordinal: int, tokens: int) -> Pass:
        """A paged layer is about to attend: the pass it belongs to, a new one when the layers start over."""
        if self._pass is None or ordinal <= self._at:
            self.settle_pending()
            prefill, later = self.reads_prompt(tokens, ordinal), self.recording and self.paged[ordinal].width > 0
            self._pass = Pass(
                prefill=prefill and not later, turn=prefill and later, listen=self.listening, defer=self.recording,
                observe=self._observe, token_ids=self._token_ids, mask=self._mask, images=self._images,
            )  # fmt: skip
        self._at = ordinal
        return self._pass

    def leave(self, ordinal: int, this: Pass) -> None:
        """A paged layer has stored its tokens: decisions about it and earlier ones, and after the last about all."""
        if this.listen and not this.defer:
            self._late_events(ordinal, this)

    def _late_events(self, ordinal: int, this: Pass) -> None:
        if not (self.method.listens("after_layer") or self.method.listens("after_forward")):
            return
        done = Done(self.paged[: ordinal + 1], this)
        if self.method.listens("after_layer"):
            self._carry_out(self.method.after_layer(done, ordinal), this)
        if ordinal == len(self.paged) - 1 and self.method.listens("after_forward"):
            self._carry_out(self.method.after_forward(done), this)

    def finish(self, output: Any) -> None:
        """A forward pass is over: `after_prompt`, unless assisted decoding is to take some of the prompt back."""
        this, self._token_ids, self._mask, self._images, self._pass = self._pass, None, None, None, None
        if this is not None and (this.prefill or this.turn) and this.listen and self.method.listens("after_prompt"):
            this.greedy, self._unheard = greedy_of(output, this), this
            if not this.defer:
                self._hear()

    def _hear(self) -> None:
        this, self._unheard = self._unheard, None
        if this is not None and this.prefill:  # not a draft, which was cropped
            self._carry_out(answered(self.method.after_prompt(prompt := Prompt(self, this)), prompt), this)

    def _carry_out(self, decisions: Mapping[int, Decisions], this: Pass) -> None:
        for ordinal, made in decisions.items():
            carry_out(self.paged, ordinal, made, this)

    def check_consumed(self) -> None:
        """Raise RuntimeError if a layer got keys that no attention function has seen."""
        layer, self.unread = self.unread, None
        if layer is not None:
            raise RuntimeError(
                f"layer {layer.core.layer} of {type(self.model).__name__} updated the cache, but its attention did "
                'not call the function registered as "kvfold" with the keys that it got: it ignores '
                "transformers' AttentionInterface, or changes the keys first"
            )

    @contextmanager
    def tentative(self, observe: Callable[[LayerView], None] | None = None) -> Iterator[None]:
        """Forward passes inside the block leave no trace: no event runs, and what they appended is taken back.

        `observe` gets every layer's view, with the queries of the pass: a draft's look-ahead, a patched prompt.
        """
        self.settle_pending()
        marks = [core.mark() for core in self.paged]
        others = [None if isinstance(x, PagedLayer) else copy.deepcopy(x) for x in self.layers]
        self._pass = None
        try:
            with self._while(listening=False, _observe=observe, reading=self.reading, _begun=None):
                yield
        finally:
            self._pass = None
            for core, mark in zip(self.paged, marks, strict=True):
                core.rewind(mark)
            self.layers = [old if old is not None else new for old, new in zip(others, self.layers, strict=True)]
            self.unread = None

    @contextmanager
    def _while(self, **state: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in state}
        self.__dict__ |= state
        try:
            yield
        finally:
            self.__dict__ |= before

    def prefilling(self) -> AbstractContextManager[None]:
        """Every forward pass inside the block reads a part of the prompt, also one of a single token.

        Outside it one token counts as generated, unless the cache is empty. For prompts that are read in chunks.
        """
        return self._while(_prefilling=True)

    def in_parts(self) -> AbstractContextManager[None]:
        """Forward passes inside the block are parts of one whose arguments are final."""
        return self._while(parts=True)

    def undecided(self) -> AbstractContextManager[None]:
        """Forward passes inside the block append, and no event runs: a method that acts in decoding lets it be."""
        return self._while(listening=False)

    def observed(self, observe: Callable[[LayerView], None]) -> AbstractContextManager[None]:
        """Within the block `observe` gets every layer's view, before the method decides."""
        return self._while(_observe=observe)

    @property
    def shares_prefill(self) -> bool:
        """Whether `adopt` may fill this cache from another's pass: it reads prompts at once, and as they are."""
        return self.prefill_chunk is None and not self.method.own_prefill

    def adopt(self, view: LayerView, *, wait: bool = False) -> None:
        """Fill one layer of this empty cache from another cache's view of its first pass. See `prefill_many`.

        `wait`: `after_prompt` waits for `end_adoption`, which knows what the model says next.
        """
        if self.method.own_prefill:
            raise ValueError(f"method={self.method} reads a prompt in its own way: it can't adopt another's prefill")
        core = self.paged[view.place.ordinal]
        if core.ordinal == 0 or self._pass is None:
            self._pass = Pass(prefill=True)  # for its step context, which the layers share
        this = Pass(prefill=True, step=self._pass.step, mask=view.queries.valid)
        this.token_ids, this.images = view.place.token_ids, view.place.images
        core.adopt(view, this)
        self.layers[core.layer].is_initialized = True
        self.leave(core.ordinal, this)
        if core.ordinal == len(self.paged) - 1 and self.method.listens("after_prompt"):
            self._unheard, self._pass = this, None
            if not wait and len(self.paged) == len(self.layers):  # else when the windows are there: `settle_pending`
                self._hear()

    # -- the cache operations --------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Take back the last `-tokens_to_remove` tokens of every row, then run what waited for it."""
        count = int(tokens_to_remove)  # a tensor from transformers before 5.17
        if self.reading is not None:
            count = -count if count <= 0 else max(0, self.get_seq_length() - count)
            self.reading, count = self.reading.drop(count), -count
        self._settle(lambda: crop_layers(self.layers, count))

    def settle_pending(self) -> None:
        """Run the events that still wait for a crop: assisted decoding is over, what came last was a further turn."""
        if self._unheard is not None or any(core.waiting for core in self.paged):
            self._settle(self._end_recording)

    def _end_recording(self) -> None:
        self.recording, turn = False, self._unheard
        for core in self.paged:
            core.settle(0, turn=True)
            core.prompt = core.prompt if turn is None else core.seen.copy()
        if turn is not None:
            turn.prefill = True

    def _settle(self, settle: Callable[[], None]) -> None:
        """Settle the layers, then run the late events of those that waited."""
        waiting = [core.waiting for core in self.paged]
        width = self.paged[0].width if self.paged else 0
        settle()
        if self._unheard is not None:
            self._unheard = self._unheard.cropped(width - self.paged[0].width)
        for core, this in zip(self.paged, waiting, strict=True):
            if this is not None:
                self._late_events(core.ordinal, this)
        self._hear()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of text given so far, padding counted, as transformers counts them."""
        return self.get_query_offset(layer_idx) + (0 if self.reading is None else self.reading.surplus)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns that a layer has read: where masks begin to count."""
        return int(super().get_seq_length(layer_idx))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        self.reading = self.reading and self.reading.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        super().batch_repeat_interleave(repeats)
        self.reading = self.reading and self.reading.select(torch.arange(self.batch_size) // repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self.reading = self.reading and self.reading.select(indices)

    def activate_past_recording(self) -> None:
        """Assisted decoding will crop after each pass: events wait until it has."""
        super().activate_past_recording()
        self.recording = True

    def reset(self) -> None:
        """Forget everything that was read."""
        # New layers: transformers' own keep the batch size and the past recording of what they have read.
        self.layers = self._layers()
        self._pass, self._at, self.recording, self.unread, self._chunks = None, -1, False, None, None
        self._unheard, self.reading, self._begun = None, None, None

    @property
    def batch_size(self) -> int:
        """Rows of the batch, -1 before the first forward pass."""
        sizes = {core.batch for core in self.paged if core.width}
        return sizes.pop() if sizes else -1

    def fork(self) -> "Cache":
        """A second cache with the same content; pages are shared until one of the two writes them.

        Each counts the pages that it shares in its own `nbytes`. `copy.copy` and `copy.deepcopy` do the same.
        """
        self.settle_pending()
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other._pass, other.unread, other._chunks = None, None, None
        other.layers = [
            self._fork_layer(layer, other) if isinstance(layer, PagedLayer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        return other

    def __copy__(self) -> "Cache":
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        # transformers' idiom for reusing a prompt: the model is not copied, pages are as soon as they are written.
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a kvfold cache belongs to its model and can't be pickled; use cache.save(path) and Cache.load")

    @staticmethod
    def _fork_layer(layer: PagedLayer, owner: "Cache") -> PagedLayer:
        forked = PagedLayer(owner, layer.core.fork())
        forked.is_initialized = layer.is_initialized or layer.core.width > 0
        return forked

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, by a temporary name first. See kvfold.hf.saving.file."""
        from kvfold.hf.saving.file import save

        save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> "Cache":
        """Read a cache that `save` wrote for this model. Raises ValueError where it does not fit the model."""
        from kvfold.hf.saving.file import load

        return load(path, model)
