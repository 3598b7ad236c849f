"""The cache that goes to `model.generate(past_key_values=...)`."""

import copy
import os
import warnings
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvfold.codecs import CacheGen, parse_codec
from kvfold.formats import Indexed
from kvfold.hf.anatomy import attention_modules
from kvfold.hf.band import Band
from kvfold.hf.call.call import Call
from kvfold.hf.call.checking import check_carried, check_reads_on
from kvfold.hf.call.hooks import hook, use_kvfold, watch
from kvfold.hf.call.host import Host
from kvfold.hf.costs import Costs, measured
from kvfold.hf.counted import Counted
from kvfold.hf.fast import Spilled, checked_fast
from kvfold.hf.latent import is_latent
from kvfold.hf.layers import PagedLayer, WindowLayer
from kvfold.hf.memory import within
from kvfold.hf.rope import find_ropes
from kvfold.hf.saving.file import load, save
from kvfold.hf.source import unfit
from kvfold.hf.support import check_model, check_windows, layers_of, unwrapped
from kvfold.hf.windows import CodedWindow
from kvfold.hf.words import sentence_ends
from kvfold.layer.layer import KVLayer, format_of
from kvfold.layer.rows import Rows
from kvfold.methods.base import Method
from kvfold.methods.registry import parse
from kvfold.options import check_int, shown
from kvfold.pages import Arena


class Cache(Counted):
    """A transformers cache that holds its tokens on pages and lets a method decide which.

    To use: pass it to `generate` or a model; `reset`, `fork`, `save`, `load`.
    To look: `nbytes`, `resident_nbytes`, `dense_nbytes`, `kept_tokens`, `kept(layer)`, `report()`, `row_nbytes()`.
    Who decides: `method`. Rows: `join`, `retire`, `take`. Blocks: `prefilling`, `undecided`, `observed`, `tentative`.
    What else help() lists is for transformers, hooks and kvfold itself.

    `method` is a slug, a composition as text, or a Method; `options` such as a budget go to the method, in a
    composition each to the one stage that has it. Sets the model's attention implementation to "kvfold", which without
    this cache computes what "sdpa" does. Sliding-window layers keep their window (in a format, with a stage such as
    "windows(form='kivi(bits=4)')") and linear-attention layers their state: no method decides what of them is kept.
    With `prefill_chunk` the model reads longer inputs in chunks of so many tokens, and the method decides after each:
    no layer ever holds more than its budget and a chunk (the answer is then not that of one pass, but for `full`; see
    docs/architecture.md).
    A long prompt goes through each layer in parts of `part_size` tokens (None: as many as were found to be fast on the
    CPU, elsewhere all at once; 0: all at once): that takes less memory, and the method and the answer are those of one
    pass.
    With an `arena` its pages (those of windows in a format apart) come out of that, which bounds the bytes of all
    caches that have it: a generated token for which there is no page raises OutOfPages before any layer has read it.
    What a prompt keeps is known when it was read, and new columns of a method when it makes them: then OutOfPages
    leaves this cache to be `reset()`.
    With `memory` (bytes, "512MiB", or a share of a dense float16 cache of `context` tokens) the budget is the largest
    with which `batch` rows never hold more, all included (hf/memory.py); more rows are refused. With `context` and no
    format bits are chosen, too (hf/bits.py), unless `quantize=False`.
    With `fast_memory` (bytes, or "256MiB") no more than that is on the model's device, prompts included, and the rest
    on the host; on the CPU, where both are one memory, pages are copied and counted as for a device. With a folder
    `spill`, on the CPU alone, no more than that is in memory and the rest in a file there, for this process alone and
    gone with it; SpillFull where the disk is full. For all methods but those that let layers share memory
    (`minicache`), on CUDA for those that hold tokens as they are.
    A wrapper around a model (a PeftModel, torch.compile's) will do: the cache belongs to the model in it.
    Raises ValueError for a model that can't work, naming what is missing, and for options that don't fit.
    """

    def __init__(
        self, model: nn.Module, method: str | Method = "full", *, prefill_chunk: int | None = None,
        part_size: int | None = None, arena: Arena | None = None, memory: int | float | str | None = None,
        context: int | None = None, batch: int = 1, quantize: bool = True, fast_memory: int | str | None = None,
        spill: str | os.PathLike[str] | None = None, **options: Any,
    ):  # fmt: skip
        chosen, model = parse(method, **options), unwrapped(model)
        chosen = limited(model, chosen, memory, context=context, batch=batch, quantize=quantize, cache=type(self))
        if not isinstance(arena, Arena | None):
            raise ValueError(f"arena={shown(arena)} must be a kvfold.Arena")
        if prefill_chunk is not None:
            check_int("prefill_chunk", prefill_chunk, 2)
            check_reads_on(chosen)
        if part_size is not None:
            check_int("part_size", part_size, 0)
        check_model(model, chosen)
        plan = layers_of(model)
        check_windows(model, chosen, plan)
        fast = checked_fast(model, chosen, fast_memory, spill, arena)
        if prefill_chunk is not None and any(hasattr(layer, "recurrent_states") for layer in plan):
            check_carried(model)
        paged = any(type(layer) is DynamicLayer for layer in plan)
        self.model, self.arena, self.call = model, arena, Call()
        self.prefill_chunk, self.part_size = prefill_chunk, part_size
        bound, ends = chosen.bind(model) if paged else chosen, partial(sentence_ends, model.name_or_path)
        self.rows = Rows(bound, None if memory is None else batch, ends)
        super().__init__(self._layers(plan))
        if fast is not None:
            self.spilled = Spilled.opened(model, fast, spill, self.for_model(model), self.paged)
            for core in self.paged:
                core.memory = self.spilled.memory
        if paged:
            use_kvfold(model)
            watch(model, self.method)
            return
        warnings.warn(
            f"{type(model).__name__} has no layer with full attention alone (it has {_kinds(plan)}): {self.method} has "
            "nothing to do, and the model computes as it did",
            stacklevel=2,
        )
        hook(model)  # which change nothing of what it computes: a draft's end, states that are forgotten, chunks

    def _layers(self, plan: list[Any]) -> list[Any]:
        """Our layers in place of transformers' own."""
        paged = tuple(index for index, layer in enumerate(plan) if type(layer) is DynamicLayer)
        modules, layers = attention_modules(self.model), list[Any]()
        ropes = find_ropes(self.model) if paged else {}
        for index, layer in enumerate(plan):
            if type(layer) is DynamicLayer:
                latent = is_latent(modules.get(index))
                rope = None if latent else ropes.get(index)
                if self.method.compact and rope is None:
                    raise ValueError(
                        f"method={self.method} needs RoPE with fixed angles to move tokens; "
                        f"{type(self.model).__name__} has none that it could use in layer {index}"
                    )
                memory = None if self.spilled is None else self.spilled.memory
                core = KVLayer(self.rows, index, paged, len(plan), rope, self.arena, memory)
                for need in self.method.needs:
                    need.of_layer(core.ordinal, rope)  # raises where it does not fit the layer
                form = format_of(self.method, core.site)
                if isinstance(form, Indexed) and form.turns and rope is None:
                    raise ValueError(
                        f"method={self.method} needs RoPE with fixed angles to choose what it reads; "
                        f"{type(self.model).__name__} has none that it could use in layer {index}"
                    )
                layers.append(PagedLayer(self, core, latent))
            elif type(layer) is DynamicSlidingWindowLayer:
                layers.append(self._window(index, layer.sliding_window, bool(paged), type(modules.get(index))))
            else:
                layers.append(layer)
        return layers

    def _window(self, index: int, size: int, paged: bool, kind: Any) -> WindowLayer:
        if paged and self.method.windows is not None:
            return CodedWindow(size, self.method.windows, index)
        window = WindowLayer(sliding_window=size)
        window.band = Band(size) if paged and unfit(kind) is None else None
        return window

    # -- copies and files ------------------------------------------------------------------------------------

    def take(self, rows: Sequence[int]) -> "Cache":
        """A cache that holds these rows, in this order; pages are shared until one of the two writes them."""
        chosen = self._checked(rows)
        if not len(chosen):
            raise ValueError(f"rows={shown(rows)} must name at least one row of the batch")
        other = self.fork()
        other._choose(chosen)
        return other

    def reset(self) -> None:
        """Forget everything that was read."""
        # New layers: transformers' own keep the batch size and the past recording of what they have read.
        self.rows = Rows(self.rows.own)
        self.layers = self._layers(layers_of(self.model))
        self._begin()

    def fork(self) -> "Cache":
        """A second cache with the same content; pages are shared until one of the two writes them.

        Each counts the pages that it shares in its own `nbytes`. `copy.copy` and `copy.deepcopy` do the same. Blocks
        such as `undecided()` that hold for this cache do not hold for the other one, nor does an assisted decoding that
        is going on: what waits for its crop is decided in the other one, and goes on waiting here.
        """
        other = type(self).__new__(type(self))
        other.model, other.prefill_chunk, other.part_size = self.model, self.prefill_chunk, self.part_size
        other.arena, other.spilled = self.arena, self.spilled
        other.rows, other.call = self.rows.fork(), Call()
        Host.__init__(other, [_forked(layer, other) for layer in self.layers])
        other.reading, other.given, other.pending = self.reading, self.given, self.pending.copied()
        other.stop_recording()
        return other

    def __copy__(self) -> "Cache":
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        # transformers' idiom for reusing a prompt: the model is not copied, pages are as soon as they are written.
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a kvfold cache belongs to its model and can't be pickled; use cache.save(path) and Cache.load")

    def save(self, path: str | os.PathLike[str], *, codec: str | CacheGen | None = None) -> None:
        """Write the cache to a safetensors file, whole or not at all, with a digest of its content.

        `codec`: a text such as "cachegen(level=2)" or a `kvfold.codecs.CacheGen`: keys and values take a fraction of
        the bytes, and are read as approximations; positions and masses stay exact. None: bit for bit.
        Raises ValueError where something else than a regular file is there and for a codec that there is not,
        ImportError where the codec's library is not installed.
        """
        save(self, path, None if codec is None else parse_codec(codec))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module, arena: Arena | None = None, *, allow: Collection[str] = (),
        fast_memory: int | str | None = None, spill: str | os.PathLike[str] | None = None,
    ) -> "Cache":  # fmt: skip
        """Read a cache that `save` wrote for this model. Raises ValueError where it does not fit the model.

        A file of which a byte was changed is refused, and so is one whose method would have a model or another file
        loaded (speckv's `draft`, a `calibration`), unless `allow` names it. `arena`: what its pages come out of;
        OutOfPages where that has no room for it. `fast_memory` and `spill`: as for a new cache; the file is read whole.
        """

        def make(method: Method, chunk: int | None) -> Cache:
            return cls(model, method, prefill_chunk=chunk, arena=arena, fast_memory=fast_memory, spill=spill)

        loaded: Cache = load(path, make, allow)
        return loaded


def _kinds(plan: list[Any]) -> str:
    """What layers there are, by transformers' names."""
    return ", ".join(dict.fromkeys(type(layer).__name__ for layer in plan))


def _forked(layer: Any, owner: Cache) -> Any:
    """A layer for a fork: over the same pages, or a copy."""
    if not isinstance(layer, PagedLayer):
        return copy.deepcopy(layer)
    forked = PagedLayer(owner, layer.core.fork(owner.rows), layer.latent)
    forked.is_initialized = layer.is_initialized or layer.core.width > 0
    return forked


def limited(
    model: PreTrainedModel, method: Method, memory: object, *, context: int | None = None, batch: int = 1,
    quantize: bool = True, cache: type[Cache] = Cache,
) -> Method:  # fmt: skip
    """The method that `Cache(model, method, memory=...)` has, without what a model's first look fills in.

    Has the model read a few tokens, for each format that it looks at. Raises ValueError as `hf/memory.py` says.
    """

    def cost(small: Method) -> tuple[Costs, int]:
        return measured(model, small, context or 0, lambda made: cache(model, made))

    return within(model, method, memory, context, batch, cost, quantize)
