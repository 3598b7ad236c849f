"""Attention over a kvfold cache as one operator, `kvfold::attend`, so that torch.compile goes through it.

What a layer stores, drops and reads is decided while a graph runs, and none of it is a part of the graph: the operator
gets the new queries, keys and values, and a tensor that names the cache, and does what an uncompiled layer does. That
tensor is declared as written to, so that no compiler leaves a call out, makes one of two, or moves one before another.
It names the cache by its content: a compiler may hand over a copy.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
MARK = "_kvfold_traced"
"""The attribute in which a key tensor carries, in a graph that is being made, the cache and the layer it belongs to."""


class Numbered:
    """Objects that graphs know by a number, for as long as they live."""

    def __init__(self) -> None:
        self._numbers, self._objects = count(1), WeakValueDictionary[int, Any]()

    def number(self, one: Any) -> int:
        """A new number for it."""
        number = next(self._numbers)
        self._objects[number] = one
        return number

    def find(self, number: int) -> Any:
        """Whose number it is; None: it is gone."""
        return self._objects.get(number)


_caches = Numbered()


def passes(layer: Any, *states: Tensor) -> bool:
    """Whether a layer's attention becomes the operator: heads on pages, and no gradient that could come through."""
    heads = getattr(layer, "latent", None) is False
    return heads and not (torch.is_grad_enabled() and any(state.requires_grad for state in states))


def name(cache: Any) -> Tensor:
    """A tensor that names a cache in graphs, for as long as it lives: int64, (1,), on the CPU, where reading it waits
    for no device."""
    number = _caches.number(cache)
    with torch.inference_mode(False):  # written to outside, too
        return torch.tensor([number], dtype=torch.int64, device="cpu")


OPERATORS = torch.library.Library("kvfold", "DEF")  # type: ignore[no-untyped-call]
"""Kept, for the operators go with it."""


def operator(schema: str, fake: F) -> Callable[[F], F]:
    """Make a function what an operator of kvfold's runs, on every device (decorator).

    `fake` makes an output of the right shape. There is no gradient: who calls the operator sees to it that none is
    wanted.
    """
    name = schema.split("(")[0]

    def add(run: F) -> F:
        OPERATORS.define(schema)  # type: ignore[no-untyped-call]
        OPERATORS.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"kvfold::{name}", fake, lib=OPERATORS)
        return run

    return add


def _like(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Tensor, layer: int, scale: float) -> Tensor:
    rows, heads, tokens, _ = q.shape
    return q.new_empty(rows, tokens, heads, v.shape[-1])


@operator(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor(a!) cache, int layer, float scale) -> Tensor", _like
)
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Tensor, layer: int, scale: float) -> Tensor:
    found = _caches.find(int(cache))
    if found is None:
        raise RuntimeError("the cache that this graph reads is gone")
    out: Tensor = found.attend(layer, q, k, v, mask, scale)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mark: tuple[Tensor, int], scale: float) -> Tensor:
    """(B, Q, Hq, Dv): what the layer that `mark` names gives, (B, Hq, Q, D) over new and stored tokens."""
    out: Tensor = torch.ops.kvfold.attend(q, k, v, mask, *mark, scale)
    return out
