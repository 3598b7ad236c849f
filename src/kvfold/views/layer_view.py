"""What a method sees of one layer: its tokens, who asked for what, and lazily the attention between them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kvfold import ops
from kvfold.formats import LOG_MASS, Chunk, Format, LateChunk
from kvfold.views.decisions import Amend, Decision, Drop, Keep, Propagate, Rewrite, Store
from kvfold.views.place import Place
from kvfold.views.queries import Queries, wide
from kvfold.views.token_view import TokenView

COLUMN_SUMS, ATTENTION = "column_sums", "attention"
"""What a method may ask the forward pass to leave (`Method.asks`), as names in a view's memo."""


@lru_cache(maxsize=64)
def faded(fade: float) -> str:
    """The name of column sums in which earlier queries count less; see `LayerView.column_sums`."""
    return COLUMN_SUMS if fade == math.inf else f"{COLUMN_SUMS} {fade!r}"


def fade_of(asked: Collection[str]) -> float | None:
    """The `fade` of the column sums that are asked for, the first of several; None: of none."""
    found = sorted(name.removeprefix(COLUMN_SUMS) for name in asked if name.startswith(COLUMN_SUMS))
    return float(found[0] or math.inf) if found else None


@dataclass(frozen=True)
class LayerView(TokenView):
    """One layer's tokens: those stored before this forward pass, then those it brought, and the attention between them.

    `valid` says which slots are tokens (rows and heads differ in length). `queries` are those of the pass.
    """

    @property
    def _differs(self) -> bool:
        """Whether the pass's log-sum-exps and answers are not those of the keys and values as they stand here."""
        return self.rewritten or bool(self.amended) or self.place.compact or not self.queries.plain

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
        lse = None if self.elsewhere is None else queries.lse.view(b, h, hq // h, w)
        return ops.window_attention(grouped, self.keys, self.place.scale, seen, self.columns.get(LOG_MASS), lse)

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
            total = torch.zeros(self.valid.shape, device=self.valid.device, dtype=torch.float32)
            for block in torch.split(slots, 64):
                total += (self.attention_of(self.queries.pick(block)) * shares[..., block, :]).sum((2, 3))
            return total
        lse = self.queries.lse.masked_fill(~self.queries.valid[:, None], torch.inf)
        start = self.queries.start
        if start is None:
            start = torch.full(self.keys.shape[:2], self.keys.shape[2] - self.new, dtype=torch.int64)
        lse = lse + fading[:, None]  # a probability is exp(logit - lse)
        return ops.column_sums(self.queries.states, self.keys, lse, self.place.scale, start, self.columns.get(LOG_MASS))

    def of_rows(self, rows: Int[Tensor, " N"], place: Place, names: Collection[str]) -> "LayerView":
        """Some rows of the batch, at their `place`, with the columns `names`: what the method sees that decides."""
        columns = {name: column for name, column in self.tokens.columns.items() if name in names}
        return LayerView(
            self.tokens.but(self.valid, columns).of_rows(rows),
            self.queries.of_rows(rows),
            place,
            order=None if self.order is None else self.order[rows],
            bounds=self.bounds,
            held=self.held,
            elsewhere=None if self.elsewhere is None else self.elsewhere[rows],
            memo={name: found[rows] for name, found in self.memo.items()},
        )

    def apply(self, decision: Decision) -> "LayerView":
        """The view after a decision; what the next method of a composition sees, and what is stored in the end."""
        if isinstance(decision, Rewrite):
            if decision.tokens.keys.shape[:3] != self.valid.shape:
                raise ValueError(
                    f"Rewrite.tokens has slots {tuple(decision.tokens.keys.shape[:3])} (B, H, T); "
                    f"it must have those of the view, {tuple(self.valid.shape)}"
                )
            tokens, lost = decision.tokens, self._folded()
            for _, mask, _ in lost:  # whose slots a rewriting may fill with anything
                keys, values = (
                    torch.where(mask[..., None], old, new)
                    for old, new in ((self.keys, tokens.keys), (self.values, tokens.values))
                )
                tokens = Chunk(keys, values, tokens.valid, tokens.columns)
            return replace(self, tokens=tokens, rewritten=True, amended=(), formats=lost, memo={})
        if isinstance(decision, Amend):
            return self._amend(decision)
        if isinstance(decision, Store):
            mask = decision.mask & self.valid
            earlier = tuple((form, others & ~mask, told) for form, others, told in self.formats)
            made = replace(self, formats=(*earlier, (decision.format, mask, decision.told)))
            return made if decision.format.traits.holds else made.apply(Keep(~mask))
        if isinstance(decision, (Keep, Drop)):
            tokens = self.tokens.but(decision.staying(self.valid), {**self.columns, **decision.columns})
            memo = dict(self.memo)
            memo.pop(ATTENTION, None)  # what is left attends anew, but what all queries gave each does not change
            return replace(self, tokens=tokens, memo=memo, changed=self.changed.union(decision.columns))
        if isinstance(decision, Propagate):
            return self  # about the layers that follow
        raise TypeError(f"decision={decision!r} is not one of Keep, Drop, Rewrite, Amend, Store, Propagate")

    def _folded(self) -> tuple[tuple[Format, Tensor, Mapping[str, Tensor]], ...]:
        """What `Store` said of tokens that are gone, which no decision about the others changes."""
        return tuple(each for each in self.formats if not each[0].traits.holds)

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
            self, tokens=tokens, amended=() if self.rewritten else (*self.amended, decision),
            formats=self._folded(), memo={},
        )  # fmt: skip
