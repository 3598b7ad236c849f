"""FastKV: from one middle layer on, only the most attended tokens of a prompt go forward (arXiv:2502.01068)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import method
from kvfold.methods.scored import Scored, both_ends, exempt
from kvfold.ops import top_mask
from kvfold.options import check_choice, check_int
from kvfold.scores import keep_top, smooth
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Propagate


@method(
    "fastkv", title="FastKV: token-selective propagation", paper="2502.01068", kind="prefill",
    formula=r"""
        s_{h,t} = \sum_{g} \mathrm{pool}_k\Big(\sum_{i \in W} A_{h,g,i,t}\Big)
        K_{l,h} = W \cup \mathrm{top}_{b-w}(s_{l,h})
        \text{behind layer } l^*: \quad t \in W \cup \mathrm{top}_{N-w}\Big(\sum_h s_{l^*,h}\Big)
    """,
    options={
        "layer": "the last layer that sees the whole prompt (l*); None: in the middle, as the paper's models have it",
        "propagated": "how many of the prompt's tokens go on (N), a share or a number",
        "window": "queries at the prompt's end whose attention counts (w); their tokens always stay and go on",
        "kernel": "width of the pooling along the sequence, odd (k)",
        "pool": '"max" or "avg"',
    },
)  # fmt: skip
@dataclass(frozen=True)
class FastKV(Scored):
    """Each layer keeps what the prompt's last queries look at; behind layer `layer` the rest is not computed at all.

    The hidden states of the tokens that do not go on end at that layer, so the later layers are faster by that share
    and their caches hold only what reached them; tokens keep their positions. Acts on every forward over several
    tokens (a prompt, a chunk, a further turn), on its new tokens; generated tokens pass all layers and are appended.
    The logits of the tokens that end early are gone: only those of the last token are the prompt's. Under assisted
    decoding all of them go on.
    Differs from the code: no smaller share goes on than the budget keeps, so that budget 1.0 is the full cache; so
    `propagated` only says something above the budget (the paper's are 0.2 and 0.1). Of fewer tokens than the window and
    4, the first go on too, or the later layers would have no sink. `layer` counts the model's layers; where it names a
    sliding window, the next layer above that is on pages is taken, else the last one; windows reach by text position.
    """

    budget: Budget = 0.1
    layer: int | None = None
    propagated: Budget = 0.2
    window: int = 8
    kernel: int = 7
    pool: str = "max"

    narrows = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_int("layer", self.layer, 0)
        check_budget(self.propagated, "propagated")
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_choice("pool", self.pool, ("avg", "max"))

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        window = view.last(self.window)
        votes = view.attention(self.window).sum(3).transpose(2, 3)  # B H T G
        votes = view.pack(votes.masked_fill((window | ~view.valid)[..., None], 0.0)).transpose(2, 3)
        pooled = smooth(votes.flatten(1, 2), self.kernel, self.pool).view(votes.shape).sum(2)
        return view.unpack(pooled).masked_fill(window, 0.0)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.window)

    def after_prefill(self, view: LayerView) -> Sequence[Decision]:  # type: ignore[override]
        scores = self.scores(view)
        counts = self.counts(view, scores)
        kept = keep_top(view, scores, counts, always=self.always(view, counts))
        if view.place.layer != self.last_whole(view) or view.queries.start is not None:  # assisted decoding
            return [kept]
        return [kept, Propagate(self.going_on(view, scores))]

    def last_whole(self, view: LayerView) -> int:
        """The model layer after which tokens end."""
        place = view.place
        wanted = place.depth // 2 - 1 if self.layer is None else self.layer
        return next((layer for layer in place.paged if layer >= wanted), place.paged[-1])

    def going_on(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Bool[Tensor, "B Q"]:
        """Which of the new tokens go on: the window, then those with the highest sums over heads."""
        new = view.queries.valid
        votes = scores[..., -view.new :].sum(1).masked_fill(~new, -torch.inf)
        own = new.sum(1)
        least = own * torch.tensor(view.fraction(self.budget), device=own.device, dtype=torch.float32)
        wanted = own * self.propagated if isinstance(self.propagated, float) else torch.full_like(own, self.propagated)
        number = torch.maximum(wanted.floor(), least.ceil()).long().clamp(min=self.window + 1)
        number = torch.minimum(number, own)[:, None]
        first, last = both_ends(number, self.window)
        ends = (new.cumsum(1) <= first) | (new.flip(1).cumsum(1).flip(1) <= last)
        return top_mask(votes.masked_fill(new & ends, torch.inf)[:, None], number)[:, 0]
