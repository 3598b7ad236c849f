"""A limit in bytes: the largest budget with which a cache never holds more, whatever it reads and generates."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from math import ceil
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from kvfold.formats import Format, Spec
from kvfold.formats.sizes import Columns, empty_segment, segment_bytes
from kvfold.hf.argument import with_cache
from kvfold.hf.layers import PagedLayer, WindowLayer, beside_bytes
from kvfold.hf.windows import CodedWindow
from kvfold.methods.base import Method, Pipeline, formats_of, stages_of
from kvfold.methods.registry import parse
from kvfold.options import check_int, shown
from kvfold.pages import PAGE_SIZE

HALF = 2
"""Bytes of a number in float16, of which a share of memory is one."""
LITTLE, LONGER = 12, 28
"""A budget in tokens, and by how many more a text is longer, with which a method shows what it keeps."""
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
UNITS = {"": 1, "b": 1} | {f"{p}{i}b": (1024 if i else 1000) ** n for n, p in enumerate("kmgt", 1) for i in ("", "i")}

Make = Callable[[Method], Any]
"""From a method to an empty cache of the model."""


def parse_memory(memory: object) -> int | float:
    """Bytes, or a share of what a dense float16 cache would hold: of 536870912, "512MiB", "0.5GB" or 0.1.

    Raises ValueError for anything else.
    """
    allowed = 'bytes (int >= 1), a text such as "512MiB" or "2GB", or a share in (0, 1] of a dense float16 cache'
    size = 0
    if isinstance(memory, str) and (found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", memory.lower())):
        number, unit = found.groups()
        if unit in UNITS and (unit or "." not in number):
            size = int(float(number) * UNITS[unit])
    elif isinstance(memory, int) and not isinstance(memory, bool):
        size = memory
    elif isinstance(memory, float) and 0.0 < memory <= 1.0:
        return memory
    if size >= 1:
        return size
    raise ValueError(f"memory={shown(memory)} must be {allowed}")


@dataclass(frozen=True)
class Costs:
    """What the tokens of one row take, at most: bytes, by the number of tokens that a KV head holds in the mean."""

    fixed: int
    """Bytes whatever is kept: windows, states, tails and tables, one page for each head."""
    each: float
    """Bytes for each token of every KV head."""
    remembered: int
    """Bytes for each generated token's queries, of those until the next cut."""

    def of(self, method: Method, budget: int) -> int:
        """Bytes that one row may come to hold under a budget."""
        return self.fixed + ceil(self.each * budget) + self.remembered * with_budget_of(method, budget).period


def within(
    model: PreTrainedModel, method: Method, memory: object, context: int | None, batch: int, make: Make
) -> Method:
    """The method with the largest budget in tokens with which a cache of `batch` rows holds at most `memory`.

    Everything counts, as in `Cache.nbytes`: columns, tables, tails of formats, remembered queries, windows, recurrent
    states. `context`: tokens of a row; a share of memory is one of a dense cache's for so many. Has the model read a
    few tokens; without `memory` the method stays as it is. Raises ValueError for a method that would not keep to a
    budget while it generates, and for a limit under which not one token fits, with the least that can be.
    """
    check_int("batch", batch, 1)
    if context is not None:
        check_int("context", context, 1)
    if memory is None:
        if context is not None or batch != 1:
            raise ValueError(f"context={context!r} and batch={batch!r} are what memory= is for, which is not given")
        return method
    limit = parse_memory(memory)
    stage = taker(method)
    low = least_of(method)
    costs, dense = measured(model, method, context or 0, max(low, LITTLE), make)
    if isinstance(limit, float):
        if context is None:
            raise ValueError(f"memory={limit!r} is a share of a dense cache: say of how many tokens, by context=")
        limit = int(limit * dense * batch)
    if (least := batch * costs.of(method, low)) > limit:
        raise ValueError(
            f"memory={shown(memory)} ({limit} bytes) is too little for batch={batch} of {type(model).__name__} under "
            f"{stage.info.slug}: {least} bytes is the least ({costs.fixed * batch} of them whatever is kept)"
        )
    high = 2 * low
    while high < 2**31 - 1 and batch * costs.of(method, high) <= limit:
        low, high = high, min(2 * high, 2**31 - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if batch * costs.of(method, middle) <= limit else (low, middle)
    return with_budget_of(method, low)


def taker(method: Method) -> Method:
    """The one stage that a budget bounds, prompt and generation. Raises ValueError where there is none."""
    taking = [stage for stage in stages_of(method) if hasattr(stage, "budget")]
    if len(taking) != 1:
        named = "none" if not taking else " and ".join(stage.info.slug for stage in taking)
        raise ValueError(f"memory= sets the budget of one stage of {method}, and {named} has one")
    stage = taking[0]
    if (given := stage.budget) != stage.info.options["budget"]:
        raise ValueError(f"memory= sets the budget of {stage.info.slug}, and budget={given!r} is given, too")
    if held := [event for event in ("after_prompt", "after_forward") if stage.listens(event)]:
        raise ValueError(
            f"memory= needs a method that cuts a prompt layer by layer; {stage} holds all of it until {held[0]}"
        )
    if not (stage.listens("after_decode") or stage.period):
        raise ValueError(
            f"memory= needs a method that keeps to its budget while it generates, which {stage} does not{_hint(method)}"
        )
    return stage


def _hint(method: Method) -> str:
    """What would be one, where that can be said."""
    stages = stages_of(method)
    if firm := [form for form in formats_of(stages) if not form.traits.drops]:
        return f": {firm[0]} drops no single tokens (requantise=True, where it has that, or a format by token)"
    if any(getattr(stage, "interval", None) == 0 for stage in stages):
        return ": its interval is 0"
    slug = next(stage.info.slug for stage in stages if hasattr(stage, "budget"))
    try:
        parse("decoding", score=slug)
    except ValueError:
        return ""
    return f": try decoding({slug})"


def least_of(method: Method) -> int:
    """The smallest budget in tokens that the method's other options leave room for."""
    for budget in count(1):
        try:
            with_budget_of(method, budget)
        except ValueError:
            if budget > MANY:
                raise
        else:
            return budget
    raise AssertionError("count() ends")


def with_budget_of(method: Method, budget: int) -> Method:
    """The method with so many tokens as the budget of the stage that has one."""
    if isinstance(method, Pipeline):
        return Pipeline(tuple(with_budget_of(stage, budget) for stage in method.stages))
    return replace(method, budget=budget) if hasattr(method, "budget") else method  # type: ignore[type-var]


@torch.no_grad()
def measured(model: PreTrainedModel, method: Method, context: int, budget: int, make: Make) -> tuple[Costs, int]:
    """What a row takes, and the bytes of a dense float16 cache of `context` tokens.

    The model reads a few tokens under a small budget, which shows the layers' shapes, the columns and the formats; what
    these take for more tokens their own segments say.
    """
    cache = make(with_budget_of(method, budget))
    ids = torch.arange(budget + LONGER, device=model.device)[None] % max(2, model.get_input_embeddings().num_embeddings)
    model(input_ids=ids, **with_cache(model, cache), use_cache=True)
    fixed, each, remembered, dense = 0.0, 0.0, 0, 0
    known, queries = dict[Any, tuple[float, float]](), model.config.get_text_config(decoder=True).num_attention_heads
    for layer in cache.layers:
        if not isinstance(layer, PagedLayer):
            most, whole = _beside(layer, context)
            fixed, dense = fixed + most, dense + whole
            continue
        core, spec = layer.core, replace(layer.core.stored.spec, rows=1, arena=None)
        own, grows = 0.0, 0.0
        for form, segment in core.segments:
            columns = tuple(sorted((name, column.dtype) for name, column in segment.columns()[1].items()))
            key = (form, replace(spec, layer=0, rope=None), columns)
            if key not in known:
                known[key] = _line(form, spec, columns, AT_INTERVALS if cache.method.period else AT_STEPS)
            own, grows = own + known[key][0], max(grows, known[key][1])
        table = 4.0 * spec.heads / PAGE_SIZE  # one head may hold all of a layer's tokens
        fixed += own + ROW
        each += grows * (1 + SPARE) + table * spec.heads
        remembered += queries * (spec.key_size * spec.dtype.itemsize + 4) + 8
        dense += HALF * context * spec.heads * (spec.key_size + (0 if layer.latent else spec.value_size))
    return Costs(ceil(fixed), each, remembered), dense


def _line(form: Format, spec: Spec, columns: Columns, spare: int) -> tuple[float, float]:
    """Bytes of a segment whatever it holds, and of each token in all heads; `spare` pages a head hold none."""

    def held(tokens: int) -> int:
        return segment_bytes(form, spec, (tokens,) * spec.heads, columns)

    each = (held(MANY) - held(FEW)) / (MANY - FEW)
    most = max(held(FEW + more) - each * (FEW + more) for more in PHASES)
    pools = empty_segment(form, spec, columns).pages_for(np.full((1, spec.heads), FEW))
    return max(0.0, most) + spare * spec.heads * sum(pool.page_nbytes for pool in pools), each


def _beside(layer: Any, context: int) -> tuple[int, int]:
    """Bytes that a layer which is not on pages may come to hold for a row, and those of `context` tokens in float16."""
    if not isinstance(layer, WindowLayer):
        return beside_bytes(layer), beside_bytes(layer)
    keys, values, size = layer.keys, layer.values, layer.sliding_window
    each = sum(x.shape[1] * x.shape[3] for x in (keys, values))
    dense = min(context, size - 1) * each * HALF
    if isinstance(layer, CodedWindow):
        spec = Spec(1, keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device, layer=layer.index)
        own, more = _line(layer.form, spec, (), AT_STEPS)
        return ceil(own + more * (size + layer.unit) * (1 + SPARE)) + ROW, dense
    # A window gives memory back when it holds a tenth too much.
    return ceil(1.1 * size * each * keys.element_size()) + ROW, dense
