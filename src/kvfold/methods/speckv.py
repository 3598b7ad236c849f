"""SpecKV: keep what a draft of the answer looks at (arXiv:2506.08373)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.methods.scored import exempt
from kvfold.options import check_choice, check_int, check_name
from kvfold.scores import keep_top
from kvfold.scores.peaks import peaks
from kvfold.scores.smoothed import smoothed
from kvfold.views import LayerView, LookAhead, PromptView, ReadOn, Requests
from kvfold.views.decisions import Keep

SCORE = "speckv_score"


@method(
    "speckv",
    title="SpecKV",
    paper="2506.08373",
    kind="evict",
    formula=r"s_j = \operatorname{maxpool}\Big(\max_{g,\; i \ge T-1-w} \operatorname{softmax}(q_i^{(g)} K^\top)_j\Big),"
    r"\quad i < T + l,\ l \text{ tokens of a draft}",
    options={
        "draft": "the model that writes the draft, by name or folder; None: the model itself",
        "lookahead": "tokens of the draft, at most",
        "window": "tokens before the prompt's last one that ask, too, and always stay",
        "kernel": "over how many neighbours a score is pooled",
        "pool": "how it is pooled: max or avg",
        "reduce": "over query heads and queries: max or mean",
    },
)
@dataclass(frozen=True)
class SpecKV(Method):
    """The highest attention from a draft of the answer and the prompt's end; the end itself always stays.

    When a prompt is over, `draft` (None: the model itself) says `lookahead` tokens greedily, up to its end token; the
    model reads them behind the whole prompt, and forgets them. They and the last `window` + 1 tokens ask.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends of the text;
    `lookahead` is a number (there: as many as will be generated; a cache does not know); the prompt is read with full
    attention (no vertical-slash pattern); the budget counts the prompt's last token, which there is fed after the cut.
    On a further turn, or after a chunk, all that is held competes anew, and a `draft` model reads what this pass
    brought alone (reconstructed). A prompt that fits its budget is not drafted for.
    """

    budget: Budget = 0.25
    draft: str | None = None
    lookahead: int = 32
    window: int = 32
    kernel: int = 7
    pool: str = "max"
    reduce: str = "max"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_name("draft", self.draft, "a model's name or folder, or None for the model itself")
        check_int("lookahead", self.lookahead, 0, high=4096)
        check_int("window", self.window, 0)
        check_int("kernel", self.kernel, 1, odd=True)
        check_choice("pool", self.pool, ("max", "avg"))
        check_choice("reduce", self.reduce, ("max", "mean"))

    def after_prefill(self, view: LayerView) -> Keep | None:
        if self._fits(view):
            return None
        behind = view.queries.valid.flip(1).cumsum(1).flip(1)  # this one and those after it
        asking = view.queries.valid & (behind <= self.window + 1)
        return Keep(view.valid, {SCORE: self.votes(view, asking)})  # their queries are gone when the draft is there

    def after_prompt(self, prompt: PromptView) -> Requests[Mapping[int, Keep]]:
        views = [prompt[ordinal] for ordinal in range(len(prompt))]
        if all(self._fits(view) for view in views):
            return {}
        votes = [view.columns.get(SCORE, torch.zeros_like(view.positions, dtype=torch.float32)) for view in views]
        if self.lookahead:
            ids, valid = yield LookAhead(self.lookahead, self.draft)

            def listen(view: LayerView) -> None:
                i, stored = view.place.ordinal, votes[view.place.ordinal].shape[-1]
                found = self.votes(view, view.queries.valid)[..., :stored]
                votes[i] = torch.maximum(votes[i], found) if self.reduce == "max" else votes[i] + found

            yield ReadOn(ids, valid, listen)
        return {i: self.choose(view, found) for i, (view, found) in enumerate(zip(views, votes, strict=True))}

    def votes(self, view: LayerView, asking: Bool[Tensor, "B Q"]) -> Float[Tensor, "B H T"]:
        """The most that each token gets of the queries `asking` and their group; for a mean all of it, as it ranks."""
        if self.reduce == "max":
            return peaks(view, asking)
        if asking.equal(view.queries.valid):
            return view.column_sums()
        return view.attention(self.window + 1).sum((2, 3))

    def choose(self, view: LayerView, votes: Float[Tensor, "B H T"]) -> Keep:
        """The prompt's end, and of the rest the highest votes of each neighbourhood."""
        counts = view.budget(self.budget)
        scores = smoothed(view, votes, view.last(self.window + 1), self.kernel, self.pool)
        return keep_top(view, scores, counts, always=exempt(view, counts, self.window + 1))

    def _fits(self, view: LayerView) -> bool:
        return bool((view.count <= view.budget(self.budget)).all())
