"""What a method leaves of a prompt in one layer, asked of the method, and the bytes of that, asked of the formats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kvfold.budgets import Budget, allocate, is_all
from kvfold.formats import POSITION, Chunk, Format, Spec
from kvfold.formats.oldest import unit_of
from kvfold.formats.sizes import segment_bytes
from kvfold.layer.layer import DENSE, format_of
from kvfold.methods import Method
from kvfold.methods.base import decided, keeping, stages_of
from kvfold.ops.dispatch import use
from kvfold.views import LayerView, Place, Queries, Site

SAMPLE = 16
"""Tokens of the view that a method is asked with."""
MORE = (250, 500)
"""Tokens of two further views, for a method that moves some to other formats: how many it moves grows evenly, and of
these most shares are whole."""


@dataclass(frozen=True)
class StoredTokens:
    """What one layer holds: tokens of each head by format, and the columns that all of them have."""

    parts: tuple[tuple[Format, tuple[int, ...]], ...]
    columns: tuple[tuple[str, torch.dtype], ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each head, whatever their format."""
        return tuple(map(sum, zip(*(tokens for _, tokens in self.parts), strict=True)))

    def nbytes(self, spec: Spec) -> int:
        """Bytes of one row's pages, tables and all else that the formats' segments hold; `spec` is of one row.

        Raises ValueError where a format refuses the layer.
        """
        return sum(segment_bytes(form, spec, tokens, self.columns) for form, tokens in self.parts) + INT64

    def least(self, spec: Spec) -> float:
        """Bytes without pages, positions and columns: what a format makes of numbers alone."""
        total, itemsize = 0.0, spec.dtype.itemsize
        for form, tokens in self.parts:
            numbers = sum(tokens) * (spec.key_size + spec.value_size) * itemsize
            if form != DENSE and numbers:
                dense = segment_bytes(DENSE, spec, tokens, self.columns)
                numbers = round(numbers * segment_bytes(form, spec, tokens, self.columns) / dense)
            total += numbers
        return total


INT64 = 8
"""Bytes of which segment a row's new tokens go to."""


def window_tokens(form: Format, window: int, context: int) -> int:
    """Tokens that a sliding window holds in a format: a page of codes stays until all of it has left."""
    unit = unit_of(form)
    return context - max(0, context - window) // unit * unit


@dataclass(frozen=True)
class _AskedView(LayerView):
    """A view of a few tokens that stands for a whole prompt: it answers with the prompt's budget, scaled down.

    `asked`: what each answer is for the whole prompt. The views that decisions make of this one add to the same list.
    """

    asked: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def budget(self, budget: Budget, weights: Any = None) -> Tensor:
        prompt, size = int(self.place.prompt[0]), self.valid.shape[-1]
        everything = is_all(budget)
        real = torch.full_like(self.count, prompt) if everything else super().budget(budget, weights)
        self.asked.append(real)
        return torch.where(
            real >= prompt, self.count, torch.minimum((real * size / prompt).ceil().long(), self.count - 1)
        )


def _asked(
    method: Method, context: int, ordinal: int, paged: tuple[int, ...], depth: int, heads: int, group: int, size: int
) -> _AskedView:
    """The view of `size` tokens after what a method decides about it at the end of a prompt of `context` tokens."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, heads, size, 8, generator=generator, dtype=torch.float32)
    positions = torch.arange(size, dtype=torch.int32)[None]
    valid = torch.ones(1, heads, size, dtype=torch.bool)
    looking = states.repeat_interleave(group, 1)
    queries = Queries(looking, valid[:, 0], torch.zeros(1, heads * group, size, dtype=torch.float32), positions)
    read = torch.tensor([context], dtype=torch.int64)
    place = Place(paged[ordinal], ordinal, paged, depth, 1.0, prompt=read, seen=read)
    columns = {POSITION: positions[:, None].expand(1, heads, size)}
    view: LayerView = _AskedView(Chunk(states, states, valid, columns), queries, place)
    if method.listens("after_prefill"):
        with use("naive"):  # the fast kernels take longer to start than these few tokens take
            for decision in decided(method.after_prefill(view)):
                view = view.apply(decision)
    assert isinstance(view, _AskedView)
    return view


@lru_cache(maxsize=16384)
def stored(
    method: Method, context: int, ordinal: int, paged: tuple[int, ...], depth: int, heads: int, group: int = 1
) -> StoredTokens:
    """What a method keeps in each head of a paged layer after a prompt of `context` tokens; `group` as in GQA.

    Raises ValueError for a method that lets layers share tokens, whose bytes are those of no single layer.
    """
    if method.shares_layers:
        raise ValueError(f"method={method} lets layers share tokens, which a plan can't size yet")
    asking = method, context, ordinal, paged, depth, heads, group
    view = _asked(*asking, SAMPLE)
    tokens = torch.full((heads,), context, dtype=torch.int64)
    for real in view.asked:
        tokens = torch.minimum(tokens, real[0])
    budgets = [stage.budget for stage in keeping(stages_of(method)) if stage.budget is not None]
    if not view.asked and len(budgets) == 1:
        # A method that decides when all layers are done: its split is its own, the sum is the budget's.
        tokens = torch.tensor(allocate(budgets[0], context, context, len(paged), heads)[ordinal], dtype=torch.int64)
    columns = tuple((name, column.dtype) for name, column in view.columns.items() if name != POSITION)
    own: Format = format_of(method, Site(paged[ordinal], ordinal, tuple(paged), depth))
    left, parts = tokens.clone(), list[tuple[Format, tuple[int, ...]]]()
    if view.formats:
        for form, moved in _moved([_asked(*asking, min(size, context)) for size in MORE], tokens).items():
            moved = torch.minimum(moved, left)
            left -= moved
            parts.append((form, tuple(moved.tolist())))
    return StoredTokens(((own, tuple(left.tolist())), *parts), columns)


def _moved(views: list[_AskedView], tokens: Tensor) -> Mapping[Format, Tensor]:
    """How many of `tokens` (H,) go to each other format, by how many of two prompts do: a share of them, but a few."""
    found: dict[Format, Tensor] = {}
    counts = [view.count[0].double() for view in views]
    for form in dict.fromkeys(form for view in views for form, _, _ in view.formats):
        moved = [
            sum(
                ((mask & view.valid)[0].sum(-1) for own, mask, _ in view.formats if own == form),
                torch.zeros((), dtype=torch.int64),
            )
            for view in views
        ]
        apart = counts[1] - counts[0]
        slope = torch.where(apart > 0, (moved[1] - moved[0]) / apart.clamp(min=1), moved[1] / counts[1].clamp(min=1))
        found[form] = (moved[1] + (tokens - counts[1]) * slope).round().long().clamp(min=0)
    return found
