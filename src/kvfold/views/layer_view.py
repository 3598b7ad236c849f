"""What a method sees of one layer: its tokens, who asked for what, and lazily the attention between them."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.budgets import Budget, allocate, is_all
from kvfold.formats import LOG_MASS, POSITION, Chunk, Format, LateChunk
from kvfold.views.decisions import Amend, Decision, Drop, Keep, Propagate, Rewrite, Store
from kvfold.views.place import Place
from kvfold.views.queries import Queries, wide

COLUMN_SUMS, ATTENTION = "column_sums", "attention"
"""What a method may ask the forward pass to leave (`Method.asks`), as names in a view's memo."""
IMAGE = "image"
"""Column (float32): 1 for a token that stands for a part of an image; of methods that carry it on."""


@lru_cache(maxsize=64)
def faded(fade: float) -> str:
    """The name of column sums in which earlier queries count less; see `LayerView.column_sums`."""
    return COLUMN_SUMS if fade == math.inf else f"{COLUMN_SUMS} {fade!r}"


def fade_of(asked: Collection[str]) -> float | None:
    """The `fade` of the column sums that are asked for, the first of several; None: of none."""
    found = sorted(name.removeprefix(COLUMN_SUMS) for name in asked if name.startswith(COLUMN_SUMS))
    return float(found[0] or math.inf) if found else None


@dataclass(frozen=True)
class LayerView:
    """One layer's tokens: those stored before this forward pass, then those it brought.

    `valid` says which slots are tokens (rows and heads differ in length). `queries` are those of the pass.
    """

    tokens: Chunk
    queries: Queries
    place: Place
    formats: tuple[tuple[Format, Tensor], ...] = ()
    """What `Store` decided: formats and the masks of tokens that go there."""
    rewritten: bool = False
    amended: tuple[Amend, ...] = ()
    """What is written over tokens that are stored; none if all are written anyway (`rewritten`)."""
    changed: frozenset[str] = frozenset()
    """Columns that a `Keep` set."""
    order: Int[Tensor, "B H S"] | None = None
    """Where the stored tokens lie in the layer's segments, counted through them; None: in this order."""
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Attention worked out so far, by the kernels of the pass or when first asked for: `COLUMN_SUMS` (B, H, T) and
    `ATTENTION` (B, H, G, Q, T) of all queries."""
    valid: Bool[Tensor, "B H T"] = field(init=False, repr=False, compare=False)
    """Which slots are tokens."""
    columns: Mapping[str, Tensor] = field(init=False, repr=False, compare=False)
    """Named numbers of each token, see `kvfold.formats`."""

    def __post_init__(self) -> None:
        self.__dict__.update(valid=self.tokens.valid, columns=self.tokens.columns)  # asked for at every turn

    @property
    def keys(self) -> Float[Tensor, "B H T D"]:
        """As the model made them, after RoPE."""
        return self.tokens.keys

    @property
    def values(self) -> Float[Tensor, "B H T Dv"]:
        """As the model made them."""
        return self.tokens.values

    @property
    def positions(self) -> Int[Tensor, "B H T"]:
        """Text positions, padding not counted; a merged token has its pivot's."""
        return self.columns[POSITION]

    @property
    def images(self) -> Bool[Tensor, "B H T"]:
        """The tokens that stand for a part of an image: new ones by their ids, earlier ones by the column `IMAGE`."""
        earlier = self.columns[IMAGE] > 0 if IMAGE in self.columns else torch.zeros_like(self.valid)
        found = earlier if self.place.images is None else earlier | self.place.images.at(self.positions)
        return found & self.valid

    @property
    def new(self) -> int:
        """How many of the last slots this forward pass brought."""
        return self.queries.states.shape[2]

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.valid.shape[1]

    @cached_property
    def count(self) -> Int[Tensor, "B H"]:
        """Tokens of each (row, head)."""
        return self.valid.sum(-1)

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

    @property
    def _differs(self) -> bool:
        """Whether the pass's log-sum-exps and answers are not those of the keys and values as they stand here."""
        return self.rewritten or bool(self.amended) or self.place.compact

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
        return torch.tensor(rows, device=self.valid.device).reshape(-1, heads)

    def last(self, window: int) -> Bool[Tensor, "B H T"]:
        """The last `window` tokens of each (row, head)."""
        return self.valid & (self.rank >= self.count[..., None] - window)

    def attention(self, window: int) -> Float[Tensor, "B H G W T"]:
        """Attention probabilities of each row's last `window` queries over all tokens, float32.

        W is at most the number of queries; where a row has fewer, its first W places hold zeros.
        """
        self._need_queries()
        w = min(window, self.new)
        if w == self.new and ATTENTION in self.memo:
            return self.memo[ATTENTION]
        return self.attention_of(self.queries.last(w))

    def attention_of(self, queries: Queries) -> Float[Tensor, "B H G W T"]:
        """Attention probabilities of these queries over all tokens that they see, float32; zeros if not valid."""
        (b, hq, w, d), h = queries.states.shape, self.heads
        asked_at = queries.positions.masked_fill(~queries.valid, -1)
        seen = (self.positions[:, :, None] <= asked_at[:, None, :, None]) & self.valid[:, :, None]
        grouped = queries.states.view(b, h, hq // h, w, d)
        return ops.window_attention(grouped, self.keys, self.place.scale, seen, self.columns.get(LOG_MASS))

    def read_by(self, queries: Queries) -> Float[Tensor, "B H G W Dv"]:
        """What these queries read, float32; zeros if not valid.

        Of all that their pass attended to, tokens that an earlier stage of a composition dropped too, if the pass left
        it and read these keys as they stand; else of this view.
        """
        if queries.read is None or self._differs:
            values = self.values.float().masked_fill(~self.valid[..., None], 0.0)  # padding may hold anything
            return self.attention_of(queries) @ values[:, :, None]
        (b, hq, w, dv), h = queries.read.shape, self.heads
        real = queries.valid[:, None, None, :, None]
        return queries.read.float().view(b, h, hq // h, w, dv).masked_fill(~real, 0.0)

    def column_sums(self, fade: float = math.inf) -> Float[Tensor, "B H T"]:
        """The attention that each token got from all queries of this pass and group, summed; float32, 0 where empty.

        `fade`: a query counts the less the further it is from the end of the text, exp(-distance / (fade * seen)).
        """
        name = faded(fade)
        if name not in self.memo:
            found = self.memo.get(ATTENTION)  # of all queries: what the kernel of a decode step leaves
            self.memo[name] = self._column_sums(fade) if found is None else found.sum((2, 3))
        return self.memo[name].masked_fill(~self.valid, 0.0)

    def _need_queries(self) -> None:
        if not self.new:
            raise ValueError(
                "this view has no queries (after_layer and after_forward see what is stored): score in after_prefill "
                "or after_decode, and carry the scores in a column or in view.place.step"
            )

    def _column_sums(self, fade: float) -> Float[Tensor, "B H T"]:
        self._need_queries()
        seen = self.place.seen.to(self.valid.device)[:, None]
        fading = (seen - 1 - self.queries.positions) / (fade * seen)  # B Q
        if self._differs:  # work out each block's own softmax
            slots = torch.arange(self.new, device=self.valid.device)
            shares = torch.exp(-fading)[:, None, None, :, None]
            total = torch.zeros(self.valid.shape, device=self.valid.device)
            for block in torch.split(slots, 64):
                total += (self.attention_of(self.queries.pick(block)) * shares[..., block, :]).sum((2, 3))
            return total
        lse = self.queries.lse.masked_fill(~self.queries.valid[:, None], torch.inf)
        start = self.queries.start
        if start is None:
            start = torch.full(self.keys.shape[:2], self.keys.shape[2] - self.new)
        lse = lse + fading[:, None]  # a probability is exp(logit - lse)
        return ops.column_sums(self.queries.states, self.keys, lse, self.place.scale, start, self.columns.get(LOG_MASS))

    def apply(self, decision: Decision) -> "LayerView":
        """The view after a decision; what the next method of a composition sees, and what is stored in the end."""
        if isinstance(decision, Rewrite):
            if decision.tokens.keys.shape[:3] != self.valid.shape:
                raise ValueError(
                    f"Rewrite.tokens has slots {tuple(decision.tokens.keys.shape[:3])} (B, H, T); "
                    f"it must have those of the view, {tuple(self.valid.shape)}"
                )
            return replace(self, tokens=decision.tokens, rewritten=True, amended=(), formats=(), memo={})
        if isinstance(decision, Amend):
            return self._amend(decision)
        if isinstance(decision, Store):
            mask = decision.mask & self.valid
            earlier = tuple((form, others & ~mask) for form, others in self.formats)
            return replace(self, formats=(*earlier, (decision.format, mask)))
        if isinstance(decision, (Keep, Drop)):
            tokens = self.tokens.but(decision.staying(self.valid), {**self.columns, **decision.columns})
            memo = dict(self.memo)
            memo.pop(ATTENTION, None)  # what is left attends anew, but what all queries gave each does not change
            return replace(self, tokens=tokens, memo=memo, changed=self.changed.union(decision.columns))
        if isinstance(decision, Propagate):
            return self  # about the layers that follow
        raise TypeError(f"decision={decision!r} is not one of Keep, Drop, Rewrite, Amend, Store, Propagate")

    def _amend(self, decision: Amend) -> "LayerView":
        if not decision.slots.shape[-1]:
            return self
        slots = decision.slots.masked_fill(decision.slots < 0, self.valid.shape[-1])  # one behind the last: for none

        def over(states: Tensor, new: Tensor | None) -> Tensor:
            if new is None:
                return states
            padded = F.pad(states, (0, 0, 0, 1))
            return padded.scatter_(2, wide(slots, new), new.to(states.dtype))[:, :, :-1]

        old = self.tokens
        tokens = LateChunk(
            lambda: over(old.keys, decision.keys), lambda: over(old.values, decision.values), old.valid, old.columns
        )
        return replace(
            self, tokens=tokens, amended=() if self.rewritten else (*self.amended, decision), formats=(), memo={}
        )
