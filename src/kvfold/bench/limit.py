"""A limit in bytes for a model's cache, planned: how many tokens, in which format, before any weight is there."""

from typing import Any

from kvfold.bench.held import stored
from kvfold.bench.plan import CPU, ModelShape
from kvfold.formats import Spec
from kvfold.formats.oldest import unit_of
from kvfold.hf.costs import HALF, Costs, PagedShape, costs_of, window_bytes
from kvfold.hf.memory import within
from kvfold.methods import Method


def limited_plan(
    shape: ModelShape, model: Any, method: Method, memory: object, *, dtype: str, context: int, batch: int,
    quantize: bool = True,
) -> Method:  # fmt: skip
    """The method that `Cache(model, method, memory=memory, context=context, batch=batch)` would have.

    `model` is one on the meta device, whose configuration says which tables were measured on it. Raises ValueError as
    `hf/memory.py` says: for a method that keeps to no budget while it generates, and for a limit that can't be met.
    """
    depth, paged = len(shape.layers), tuple(i for i, layer in enumerate(shape.layers) if layer.paged)

    def cost(small: Method) -> tuple[Costs, int]:
        beside, dense, found = 0, 0, list[PagedShape]()
        for index, layer in enumerate(shape.layers):
            spec = Spec(1, layer.heads, layer.key_size, layer.value_size, shape.kind(dtype), CPU, layer=index)
            beside += layer.state_bytes
            dense += layer.state_bytes + HALF * layer.tokens(context) * layer.heads * layer.dense_size
            if layer.paged:
                group = shape.query_heads // layer.heads
                held = stored(small, context, paged.index(index), paged, depth, layer.heads, group)
                forms = tuple((form, held.columns) for form, _ in held.parts)
                found.append(PagedShape(spec, forms, shape.query_heads))
            elif layer.window is not None:
                form = small.windows
                beside += window_bytes(form, spec, layer.window, 0 if form is None else unit_of(form))
        return costs_of(found, beside, small), dense

    return within(model, method, memory, context, batch, cost, quantize)
