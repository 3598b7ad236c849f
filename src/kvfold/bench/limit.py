"""A limit in bytes for a model's cache, planned: how many tokens, in which format, before any weight is there."""

from typing import Any

from kvfold.bench.plan import ModelShape
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

    def cost(small: Method) -> tuple[Costs, int]:
        beside, dense, found = 0, 0, list[PagedShape]()
        for layer, spec, held in shape.held(small, context, dtype):
            beside += layer.state_bytes
            dense += layer.state_bytes + layer.dense_bytes(context, HALF)
            if held is not None:
                forms = tuple((form, held.columns) for form, _ in held.parts)
                found.append(PagedShape(spec, forms, shape.query_heads))
            elif layer.window is not None:
                beside += window_bytes(small.windows, spec, layer.window)
        return costs_of(found, beside, small), dense

    return within(model, method, memory, context, batch, cost, quantize)
