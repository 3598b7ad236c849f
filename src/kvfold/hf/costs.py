"""What the tokens of a row may come to take under a budget, in bytes: of prompt, generation and all else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvfold.formats import Format, Segment, Spec
from kvfold.formats.oldest import unit_of
from kvfold.formats.sizes import Columns, empty_segment, segment_bytes, shared_bytes
from kvfold.hf.argument import with_cache
from kvfold.hf.layers import PagedLayer, WindowLayer, beside_bytes
from kvfold.hf.windows import CodedWindow
from kvfold.methods.base import Method, Pipeline, keeping, stages_of
from kvfold.pages import PAGE_SIZE

HALF = 2
"""Bytes of a number in float16, of which a share of memory is one."""
LONGER = 28
"""By how many tokens a text is longer than the budget with which a method shows what it keeps."""
FEW, MANY = 1024, 2048
"""Tokens a head by which the bytes of a format are measured: all that is not cut off by them grows with the tokens."""
SPARE = 1 / 16
"""Pages that a table may hold without a token, of those that it needs (pages/moving.py, pages/table.py)."""
AT_INTERVALS, AT_STEPS = 2, 4
"""And of each head: the last is not full, one is there before it is asked for, and what every token drops may wait."""
PHASES = range(0, 144, 9)
"""Tokens more by which a tail is at its longest once, before a page of codes takes them."""
ROW = 64
"""Bytes of a row's counters in a layer, at most."""

Make = Callable[[Method], Any]
"""From a method to an empty cache of the model."""


@dataclass(frozen=True)
class Costs:
    """What the tokens of one row take, at most: bytes, by the number of tokens that a KV head holds in the mean."""

    fixed: int
    """Bytes whatever is kept: windows, states, tails and tables, one page for each head."""
    each: float
    """Bytes for each token of every KV head."""
    remembered: int
    """Bytes for each generated token's queries, of those until the next cut."""
    once: int = 0
    """Bytes that a cache holds once, however many rows it has: what formats measured of a model."""

    def of(self, method: Method, budget: int) -> int:
        """Bytes that one row may come to hold under a budget."""
        return self.fixed + ceil(self.each * budget) + self.remembered * with_budget_of(method, budget).period

    def most(self, method: Method, low: int, limit: int) -> int:
        """The largest budget in tokens, from `low` on, with which a row holds at most `limit` bytes. `low` does."""
        high = 2 * low
        while high < 2**31 - 1 and self.of(method, high) <= limit:
            low, high = high, min(2 * high, 2**31 - 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.of(method, middle) <= limit else (low, middle)
        return low


@dataclass(frozen=True)
class PagedShape:
    """A layer on pages: `spec` of one row, the formats that it has segments in with their columns, query heads."""

    spec: Spec
    forms: tuple[tuple[Format, Columns], ...]
    queries: int


def costs_of(paged: Iterable[PagedShape], beside: int, method: Method) -> Costs:
    """What a row takes in layers on pages; `beside`: bytes of all other layers. Asked of the formats' own segments."""
    fixed, each, remembered, once = float(beside), 0.0, 0, 0
    known = dict[Any, tuple[float, float, int]]()
    for shape in paged:
        own, grows = 0.0, 0.0
        for form, columns in shape.forms:
            key = (form, replace(shape.spec, layer=0, rope=None), columns)
            if key not in known:
                spare = AT_INTERVALS if method.period else AT_STEPS
                known[key] = (*line_of(form, shape.spec, columns, spare), shared_bytes(form, shape.spec, columns))
            line, more, shared = known[key]
            own, grows, once = own + line - shared, max(grows, more), once + shared
        heads = shape.spec.heads
        table = 4.0 * heads / PAGE_SIZE  # one head may hold all of a layer's tokens
        fixed += own + ROW
        each += grows * (1 + SPARE) + table * heads
        remembered += shape.queries * (shape.spec.key_size * shape.spec.dtype.itemsize + 4) + 8
    return Costs(ceil(fixed), each, remembered, once)


def line_of(form: Format, spec: Spec, columns: Columns, spare: int) -> tuple[float, float]:
    """Bytes of a segment whatever it holds, and of each token in all heads; `spare` pages a head hold none."""

    def held(tokens: int) -> int:
        return segment_bytes(form, spec, (tokens,) * spec.heads, columns)

    each = (held(MANY) - held(FEW)) / (MANY - FEW)
    most = max(held(FEW + more) - each * (FEW + more) for more in PHASES)
    pools = empty_segment(form, spec, columns).pages_for(np.full((1, spec.heads), FEW))
    return max(0.0, most) + spare * spec.heads * sum(pool.page_nbytes for pool in pools), each


def window_bytes(form: Format | None, spec: Spec, size: int) -> int:
    """Bytes that a window of `size` tokens may come to hold for a row, in a format or as the model made them."""
    if form is None:
        each = spec.heads * (spec.key_size + spec.value_size)
        # A window gives memory back when it holds a tenth too much.
        return ceil(1.1 * size * each * spec.dtype.itemsize) + ROW
    own, more = line_of(form, spec, (), AT_STEPS)
    return ceil(own + more * (size + unit_of(form)) * (1 + SPARE)) + ROW


@torch.no_grad()
def measured(model: PreTrainedModel, method: Method, context: int, make: Make) -> tuple[Costs, int]:
    """What a row takes, and the bytes of a dense float16 cache of `context` tokens.

    The model reads a few tokens under a method with a small budget, which shows the layers' shapes, the columns and the
    formats; what these take for more tokens their own segments say.
    """
    cache, budget = make(method), max([stage.budget for stage in keeping(stages_of(method))], default=1)
    ids = torch.arange(budget + LONGER, device=model.device)[None] % max(2, model.get_input_embeddings().num_embeddings)
    model(input_ids=ids, **with_cache(model, cache), use_cache=True)
    queries = model.config.get_text_config(decoder=True).num_attention_heads
    beside, dense, paged = 0, 0, list[PagedShape]()
    for layer in cache.layers:
        if not isinstance(layer, PagedLayer):
            most, whole = _beside(layer, context)
            beside, dense = beside + most, dense + whole
            continue
        core, spec = layer.core, replace(layer.core.stored.spec, rows=1, arena=None, memory=None)
        forms = tuple((form, _columns(segment)) for form, segment in core.segments)
        paged.append(PagedShape(spec, forms, queries))
        dense += HALF * context * spec.heads * (spec.key_size + (0 if layer.latent else spec.value_size))
    return costs_of(paged, beside, cache.method), dense


def _columns(segment: Segment) -> Columns:
    return tuple(sorted((name, column.dtype) for name, column in segment.columns()[1].items()))


def _beside(layer: Any, context: int) -> tuple[int, int]:
    """Bytes that a layer which is not on pages may come to hold for a row, and those of `context` tokens in float16."""
    if not isinstance(layer, WindowLayer):
        return beside_bytes(layer), beside_bytes(layer)
    keys, values, size = layer.keys, layer.values, layer.sliding_window
    spec = Spec(1, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
    dense = min(context, size - 1) * spec.heads * (spec.key_size + spec.value_size) * HALF
    return window_bytes(layer.form if isinstance(layer, CodedWindow) else None, spec, size), dense


def with_budget_of(method: Method, budget: int) -> Method:
    """The method with so many tokens as the budget of the stage that has one."""
    if isinstance(method, Pipeline):
        return Pipeline(tuple(with_budget_of(stage, budget) for stage in method.stages))
    return replace(method, budget=budget) if keeping([method]) else method  # type: ignore[type-var]
