"""Scissorhands: drop the tokens that fell below even attention most often (arXiv:2305.17118)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Scored, exempt
from kvfold.options import check_int, check_number
from kvfold.scores import ranked, top_mask
from kvfold.scores.rows import logit_rows
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

SCORE, TOLERANCE = "scissorhands_score", 1e-5


@method(
    "scissorhands", title="Scissorhands", paper="2305.17118", kind="evict",
    formula=r"s_{h,t} = \frac{1}{G|W|}\sum_{g}\sum_{i \in W} \Big[A_{h,g,i,t} \ge \frac{1}{n_i}\Big]",
    options={
        "window": "last queries that are asked (W)",
        "recent": "last tokens that always stay",
        "drop": "share of its budget that a head drops at once when it exceeds it while decoding",
        "sinks": "first tokens that always stay",
    },
)  # fmt: skip
@dataclass(frozen=True)
class Scissorhands(Scored):
    """Of the last `window` queries, how many gave a token at least 1 / (the number of keys that they saw).

    The last `recent` tokens stay, and the first `sinks`. A prompt is cut to the budget; while decoding, a head that
    exceeds it drops the share `drop` of its budget at once (the paper: half, reconstructed), the older token where
    counts tie (ours). The cache is then smaller than its budget: by a quarter of it, on average.
    Where the budget has no room for those and 4 more, the first 4 tokens and the newest stay.
    Differs from the paper: a token counts for the queries since it came, as a share of them, or nothing would be as
    safe as to be young. What past queries said lives in a column, a mean over the tokens that they saw, whose memory is
    `window` queries; the paper asks them again. Query heads of a group add up. All layers have the same budget: the
    paper gives later ones more, after a measurement that it does not print (reconstructed).
    """

    window: int = 400
    recent: int = 10
    drop: float = 0.5
    sinks: int = 0

    asks = frozenset({"attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("recent", self.recent, 0)
        check_number("drop", self.drop, 0.0, 1.0)
        check_int("sinks", self.sinks, 0)

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        times = torch.zeros(view.valid.shape, dtype=torch.float32, device=view.valid.device)
        asked = torch.zeros_like(times)
        for _, seen, logits in logit_rows(view, self.window):
            even = 1.0 / seen.sum(-1, keepdim=True)[:, :, None]  # B H 1 W 1
            important = seen[:, :, None] & (logits.softmax(-1) >= even * (1 - TOLERANCE))
            times[..., : seen.shape[-1]] += important.sum((2, 3))
            asked[..., : seen.shape[-1]] += seen.sum(2)
        group = view.queries.states.shape[1] // view.heads
        if SCORE in view.columns:
            age = view.place.seen.to(asked.device)[:, None, None] - view.positions
            past = (age.clamp(max=self.window) - asked).clamp(min=0)
            times, asked = times + group * past * view.columns[SCORE], asked + past
        return times / (group * asked).clamp(min=1)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.recent, self.sinks)

    def after_prefill(self, view: LayerView) -> Keep:
        return self._cut(view, view.budget(self.budget))

    def after_decode(self, view: LayerView) -> Keep:
        budget = view.budget(self.budget)
        dropped = (budget * self.drop).long().clamp(min=1)
        return self._cut(view, torch.where(view.count > budget, budget + 1 - dropped, budget))

    def _cut(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Keep:
        scores = self.scores(view)
        if not (view.count > counts).any():
            return Keep(view.valid, {SCORE: scores})
        ranks = ranked(view, scores, self.always(view, counts))
        mask = top_mask(ranks.flip(-1), counts).flip(-1)  # where scores tie, the later token stays
        return Keep(mask, {SCORE: scores})
