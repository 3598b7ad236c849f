"""LaCache: a ladder of kept tokens that shifts from layer to layer, by position alone (arXiv:2507.14204)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.budgets.layers import tokens_each
from kvfold.methods.base import Method, method
from kvfold.methods.scored import exempt
from kvfold.options import check_choice, check_int
from kvfold.scores import keep_top
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

DONE = "lacache_done"
"""Column: 1 for tokens that lie before the cursor, that is, in ladders that were thinned already; `OVER` for one
that a layer holds beyond the others, where a budget does not divide evenly."""
OVER = 2


@method(
    "lacache", title="LaCache", paper="2507.14204", kind="pattern",
    formula=r"t \in K_l \iff 0 \le (t - c) \bmod M - (l \bmod (M - m + 1)) \lt m",
    options={
        "span": "layers that keep a token, about; None: half of them",
        "overlap": "layers that neighbouring rungs share",
        "sinks": "first tokens that always stay",
        "ladder": '"cyclic" turns the rung with every layer, "consecutive" gives a rung to layers in a row',
        "positions": '"original", or "compact": keys are read as if they stood side by side',
    },
)  # fmt: skip
@dataclass(frozen=True)
class LaCache(Method):
    """Of every `rungs` old tokens in a row a layer keeps a few, which ones depends on the layer; sinks and end stay.

    A token is kept by about `span` layers (None: half of them, as 16 of 32), neighbouring rungs share `overlap`.
    With no room for further ladders they start over from the sinks, so that text gets sparser with age.
    `ladder="cyclic"` turns the rung with every layer, as the official code does; "consecutive" gives a rung to
    layers in a row, as the paper draws it (reconstructed). Positions: as in StreamingLLM; the paper's are "compact".
    Differs from the paper: the budget is never exceeded (the official code adds half a ladder to it), and after a
    prompt it is used up: of the last rungs to go, the newest stay. Ladders are laid for the budget rounded down, so
    that they are the same in all layers, and what is left of it goes to the newest of the dropped. A token at least
    goes from every ladder, and a budget too small for sinks, a ladder and one token for each layer keeps both ends of
    the text.
    """

    budget: Budget = 0.25
    span: int | None = None
    overlap: int = 0
    sinks: int = 4
    ladder: str = "cyclic"
    positions: str = "original"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if self.span is not None:
            check_int("span", self.span, 1)
        check_int("overlap", self.overlap, 0)
        if self.overlap >= (self.span or self.overlap + 1):
            raise ValueError(f"overlap={self.overlap!r} must be less than span={self.span!r}")
        check_int("sinks", self.sinks, 0)
        check_choice("ladder", self.ladder, ("cyclic", "consecutive"))
        check_choice("positions", self.positions, ("original", "compact"))

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether keys are read at consecutive slots."""
        return self.positions == "compact"

    def rungs(self, layers: int) -> tuple[int, int, int]:
        """Tokens of a ladder, those of them that a layer keeps, and the step from rung to rung in layers."""
        span = self.span or max(1, layers // 2)
        step = max(1, span - self.overlap)
        before = 1 + max(0, -(-(layers - span) // step))
        after = min(-(-span // step), before)
        return max(before, after + 1), after, step

    def after_prefill(self, view: LayerView) -> Keep:
        return self._cut(view, fill=True)

    def after_decode(self, view: LayerView) -> Keep:
        return self._cut(view, fill=False)

    def _cut(self, view: LayerView, fill: bool) -> Keep:
        over = view.columns[DONE] == OVER if DONE in view.columns else torch.zeros_like(view.valid)
        even, allowed = self._even(view), view.budget(self.budget).to(view.valid.device)
        alike = replace(view, tokens=view.tokens.but(view.valid & ~over))  # as many in every layer
        thinned, done = self._compacted(alike, even)
        # First what the ladders keep, the sinks before the rest of it; then the newest of what they do not.
        first = thinned.float() + (thinned & (alike.rank < self.sinks)).float()
        counts = even if fill else torch.minimum(even, thinned.sum(-1))
        short = even < self.sinks + view.place.layers + self.rungs(view.place.layers)[1]  # no room for a ladder
        counts = torch.where(short, even, counts)
        ends = exempt(alike, even, int(view.valid.shape[-1]), self.sinks) & short[..., None]
        kept = keep_top(alike, alike.rank + view.valid.shape[-1] * first, counts, ends).mask
        left = view.valid & ~kept if fill else over & view.valid & ~kept
        over = left & (left.flip(-1).cumsum(-1).flip(-1) <= (allowed - even)[..., None])
        return Keep(kept | over, {DONE: done.int().masked_fill(over, OVER)})

    def _even(self, view: LayerView) -> Int[Tensor, "B H"]:
        """What the budget lets every layer and head hold."""
        if is_all(self.budget):
            return view.count
        each = tokens_each(self.budget, view.place.prompt, view.place.seen)
        return torch.tensor([int(x + 1e-9) for x in each], device=view.valid.device, dtype=torch.int64)[:, None].expand(
            -1, view.heads
        )

    def _compacted(
        self, view: LayerView, room: Int[Tensor, "B H"]
    ) -> tuple[Bool[Tensor, "B H T"], Bool[Tensor, "B H T"]]:
        """What the ladders keep, and which tokens lie before the new cursor."""
        layers, layer = view.place.layers, view.place.ordinal
        before, after, step = self.rungs(layers)
        freed = before - after
        sinks = (room - layers - 1).clamp(min=0, max=self.sinks)
        old = view.columns[DONE] > 0 if DONE in view.columns else torch.zeros_like(view.valid)
        cursor = torch.maximum((old & view.valid).sum(-1), sinks)
        need = (view.count - room).clamp(min=0)
        ladders = (room - cursor - layers).clamp(min=0) // after
        over = need > ladders * freed
        ladders = torch.where(over, ladders, -(-need // freed))
        first = self._turn(layer, step, after, freed, torch.full_like(room, freed))
        kept = self._thin(
            view.rank, cursor, ladders, torch.full_like(room, before), first, torch.ones_like(room), after
        )
        done = view.rank < (cursor + before * ladders)[..., None]
        # No room left: the same once more from the sinks on, over what the first round leaves.
        still = (need - ladders * freed).clamp(min=0)
        times = -(-still // ((room - sinks - layers).clamp(min=after) // after * freed))
        wide = before + (times - 1).clamp(min=0) * (before - 1)
        again = -(-still // (wide - after))
        first = self._turn(layer, step, after, freed, wide - after)
        rank = (kept & view.valid).cumsum(-1) - 1
        second = self._thin(rank, sinks, again, wide, first, times.clamp(min=1), after)
        over = over[..., None]
        done = torch.where(over, rank < (sinks + wide * again)[..., None], done)
        changed = (need > 0)[..., None]
        return view.valid & kept & (second | ~over), view.valid & torch.where(changed, done, old)

    def _turn(self, layer: int, step: int, after: int, freed: int, wide: Int[Tensor, "B H"]) -> Int[Tensor, "B H"]:
        """Where in a ladder that frees `wide` tokens this layer's first rung is."""
        if self.ladder == "cyclic":
            return layer % (wide + 1)
        return min(max(layer // step - after + 1, 0), freed) * wide // freed

    @staticmethod
    def _thin(
        rank: Int[Tensor, "B H T"],
        cursor: Int[Tensor, "B H"],
        ladders: Int[Tensor, "B H"],
        before: Int[Tensor, "B H"],
        first: Int[Tensor, "B H"],
        apart: Int[Tensor, "B H"],
        after: int,
    ) -> Bool[Tensor, "B H T"]:
        """What is not in the ladders from `cursor` on, and of each ladder this layer's rungs, `apart` tokens apart."""
        cursor, ladders, before, first, apart = (x[..., None] for x in (cursor, ladders, before, first, apart))
        kept = (rank < cursor) | (rank >= cursor + before * ladders)
        for rung in range(after):
            at = rank - cursor - first - apart * rung
            kept |= (at >= 0) & (at % before == 0) & (at < before * ladders)
        return kept
