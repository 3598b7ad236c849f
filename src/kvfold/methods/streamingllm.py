"""StreamingLLM: keep the first few tokens and a rolling recent window (arXiv:2309.17453)."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.methods.base import Method, method
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int
from kvfold.scores import drop_from
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep


@method(
    "streamingllm", title="StreamingLLM", paper="2309.17453", kind="pattern",
    formula=r"K = \lbrace t : t \lt s \rbrace \cup \lbrace t : t \ge n - (b - s) \rbrace",
    options={
        "sinks": "first tokens that always stay (s)",
        "positions": '"original", or "compact": keys are read as if they stood side by side',
    },
)  # fmt: skip
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Attention sinks and the most recent tokens, after the prompt and after every generated token.

    With `positions="compact"` the kept tokens are read as if they stood at 0, 1, 2, ... (the paper's rule for
    endless streams; needs the model's RoPE); "original" leaves them where they were, as most comparisons do.
    A budget that would be all sinks is shared with the newest tokens.
    Differs from the paper: a prompt is read with full attention and cut once, not token by token.
    """

    budget: Budget = 0.25
    sinks: int = 4
    positions: str = "original"

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("sinks", self.sinks, 0)
        check_choice("positions", self.positions, ("original", "compact"))

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Whether keys are read at consecutive slots."""
        return self.positions == "compact"

    def after_prefill(self, view: LayerView) -> Keep:
        budget = view.budget(self.budget)
        sinks = self.first(budget)
        return Keep(recent(view, budget - sinks) | (view.valid & (view.rank < sinks[..., None])))

    def after_decode(self, view: LayerView) -> Drop:
        budget = view.budget(self.budget)
        return drop_from(view, self.first(budget), view.count - budget)

    def first(self, budget: Int[Tensor, "B H"]) -> Int[Tensor, "B H"]:
        """How many sinks there are; half of a budget that would be all theirs."""
        return torch.where(budget > self.sinks, self.sinks, budget // 2)
