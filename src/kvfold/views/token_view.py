"""One layer's tokens as a method sees them: which, where, how many, and how many may stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, allocate, is_all
from kvfold.formats import Chunk, Format
from kvfold.views.decisions import Amend
from kvfold.views.place import Place
from kvfold.views.queries import Queries, wide

IMAGE = "image"
"""Column (float32): 1 for a token that stands for a part of an image; of methods that carry it on."""


@dataclass(frozen=True)
class TokenView:
    """One layer's tokens: those stored before this forward pass, then those it brought.

    `valid` says which slots are tokens (rows and heads differ in length). `queries` are those of the pass.
    """

    tokens: Chunk
    queries: Queries
    place: Place
    formats: tuple[tuple[Format, Tensor, Mapping[str, Tensor]], ...] = ()
    """What `Store` decided: formats, the masks of tokens that go there, and what else the formats are told."""
    rewritten: bool = False
    amended: tuple[Amend, ...] = ()
    """What is written over tokens that are stored; none if all are written anyway (`rewritten`)."""
    changed: frozenset[str] = frozenset()
    """Columns that a `Keep` set."""
    order: Int[Tensor, "B H S"] | None = None
    """Where the stored tokens lie in the layer's segments, counted through them; None: in this order."""
    bounds: tuple[int, ...] = ()
    """Where each segment's slots end, counted so."""
    held: tuple[Format, ...] = ()
    """The segments' formats."""
    elsewhere: Int[Tensor, "B H"] | None = None
    """How many tokens of each (row, head) it does not show: those in other formats than the one that new ones go to,
    at a step of a method that needs none of them (`Method.own_steps`). None: it shows all."""
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Attention worked out so far, by the kernels of the pass or when first asked for: `COLUMN_SUMS` (B, H, T) and
    `ATTENTION` (B, H, G, Q, T) of all queries."""

    @cached_property
    def keys(self) -> Float[Tensor, "B H T D"]:
        """As the model made them, after RoPE."""
        return self.tokens.keys

    @cached_property
    def values(self) -> Float[Tensor, "B H T Dv"]:
        """As the model made them."""
        return self.tokens.values

    @cached_property
    def positions(self) -> Int[Tensor, "B H T"]:
        """Text positions, padding not counted; a merged token has its pivot's."""
        return self.tokens.positions

    @cached_property
    def valid(self) -> Bool[Tensor, "B H T"]:
        """Which slots are tokens."""
        return self.tokens.valid

    @cached_property
    def columns(self) -> Mapping[str, Tensor]:
        """Named numbers of each token, see `kvfold.formats`."""
        return self.tokens.columns

    @property
    def images(self) -> Bool[Tensor, "B H T"]:
        """The tokens that stand for a part of an image: new ones by their ids, earlier ones by the column `IMAGE`."""
        earlier = self.columns[IMAGE] > 0 if IMAGE in self.columns else torch.zeros_like(self.valid)
        found = earlier if self.place.images is None else earlier | self.place.images.at(self.positions)
        return found & self.valid

    @cached_property
    def new(self) -> int:
        """How many of the last slots this forward pass brought."""
        return self.queries.states.shape[2]

    @cached_property
    def heads(self) -> int:
        """KV heads."""
        return self.valid.shape[1]

    @cached_property
    def home(self) -> Int[Tensor, "B H T"]:
        """Which segment holds each token, a place in `held`; -1: none yet. Slots without a token say nothing."""
        slots = torch.arange(self.valid.shape[-1], device=self.valid.device).expand(self.valid.shape)
        if self.order is not None:
            slots = torch.cat([self.order, slots[..., self.order.shape[-1] :]], -1)
        ends = torch.tensor(self.bounds or (0,), device=slots.device, dtype=torch.int64)
        return torch.bucketize(slots.contiguous(), ends, right=True).masked_fill(slots >= ends[-1], -1)

    @cached_property
    def count(self) -> Int[Tensor, "B H"]:
        """Tokens of each (row, head)."""
        return self.valid.sum(-1)

    @property
    def total(self) -> Int[Tensor, "B H"]:
        """`count`, with those that it does not show."""
        return self.count if self.elsewhere is None else self.count + self.elsewhere

    @cached_property
    def rank(self) -> Int[Tensor, "B H T"]:
        """The how-manieth token of its row and head a slot is, from 0."""
        return self.valid.cumsum(-1) - 1

    @cached_property
    def earlier(self) -> Bool[Tensor, "B H T"]:
        """The tokens that were there before this forward pass."""
        if not self.new:
            return self.valid
        never = torch.iinfo(self.positions.dtype).max  # padding may have the position of any token
        first = self.queries.positions.masked_fill(~self.queries.valid, never).amin(1)
        return self.valid & (self.positions < first[:, None, None])

    @cached_property
    def _packed(self) -> Int[Tensor, "B H T"]:
        return torch.argsort((~self.valid).byte(), dim=-1, stable=True)

    def pack(self, x: Tensor) -> Tensor:
        """A (B, H, T, ...) tensor with the tokens of each (row, head) side by side from 0 on, empty slots behind."""
        return x.gather(2, wide(self._packed, x))

    def unpack(self, x: Tensor) -> Tensor:
        """What `pack` did, undone."""
        return torch.empty_like(x).scatter_(2, wide(self._packed, x), x)

    def fraction(self, budget: Budget) -> list[float]:
        """The budget as a fraction of each row's prompt."""
        if isinstance(budget, float):
            return [budget] * len(self.place.prompt)
        return [min(1.0, budget / max(1, prompt)) for prompt in self.place.prompt.tolist()]

    def budget(
        self, budget: Budget, weights: Callable[[float], tuple[float, ...]] | Sequence[tuple[float, ...]] | None = None
    ) -> Int[Tensor, "B H"]:
        """How many tokens each (row, head) of this layer may keep.

        `weights` gives each layer's share of a budget that is this fraction of the prompt (default: the same for all),
        or holds such shares for each row.
        A fraction of 1.0 is no limit: it holds for generated tokens too.
        """
        if is_all(budget):
            return self.count
        place, heads = self.place, self.valid.shape[1]
        layers, prompts = len(place.paged), place.prompt.tolist()
        shares = [weights(part) for part in self.fraction(budget)] if callable(weights) else weights
        rows = []
        for row, (prompt, seen) in enumerate(zip(prompts, place.seen.tolist(), strict=True)):
            # Of an even share a text that grows changes nothing any more.
            cap = prompt if isinstance(budget, float) else seen if shares else min(seen, budget)
            rows.append(allocate(budget, prompt, cap, layers, heads, shares[row] if shares else None)[place.ordinal])
        return torch.tensor(rows, device=self.valid.device, dtype=torch.int64).reshape(-1, heads)

    def last(self, window: int) -> Bool[Tensor, "B H T"]:
        """The last `window` tokens of each (row, head)."""
        return self.valid & (self.rank >= self.count[..., None] - window)
