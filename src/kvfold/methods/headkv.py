"""HeadKV: heads that retrieve and reason get more of the budget (arXiv:2410.19258)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.budgets import Budget, is_all
from kvfold.budgets.heads import allocate_heads
from kvfold.methods._calibrated import Table, check_table, filled, over_groups, query_heads, table_of
from kvfold.methods.base import method
from kvfold.methods.scored import Wrapper
from kvfold.options import check_choice, check_int, check_number
from kvfold.views import LayerView


@method(
    "headkv", title="HeadKV", paper="2410.19258", kind="budget",
    formula=r"""
        p = \lfloor (b - w) / \beta \rfloor
        b_{l,h} = b - p + \frac{I_{l,h}}{\sum_{m,j} I_{m,j}} L H p
    """,
    options={
        "window": "tokens of the score's own window, which no head has to give (w); None: as `score` has it",
        "beta": "the pool that heads share by importance is 1 / beta of the budget",
        "table": 'which scores: "reason" (HeadKV-R2) or "copy" (HeadKV-R)',
        "heads": (
            "scores of the query heads, a row a layer (I, their mean over a KV head's group); None: "
            "from the calibration"
        ),
    },
)  # fmt: skip
@dataclass(frozen=True)
class HeadKV(Wrapper):
    """Each head's tokens: an even floor, and its part of a pool that all heads of the model share by their scores.

    With b = budget - window a head, the pool is L H floor(b / beta) and the floor b - floor(b / beta); the window
    comes on top, and `score` (SnapKV as the paper has it) says which tokens. `heads` are scores of the query heads
    from `kvfold calibrate headkv`: `table="reason"` (HeadKV-R2: attention to the right answer among distractors) or
    "copy" (HeadKV-R: the token that is copied is the most attended). Acts at the end of a prompt.
    Differs from the paper: a KV head has the mean of its group's scores, and the group votes together, before pooling
    (the official code keeps a copy of the keys for each query head). What a short prompt cuts off a head's share goes
    to the others.
    """

    score: str = "snapkv(window=8, kernel=7, pool='max')"
    window: int | None = None
    beta: float = 1.5
    table: str = "reason"
    heads: Table | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        own = getattr(self.inner, "window", None)
        if self.window is not None:
            check_int("window", self.window, 0)
            if own is not None and own != self.window:
                raise ValueError(f"window={self.window!r} must be that of score={self.score!r}, {own}; None takes it")
        check_number("beta", self.beta, 1.0, 1e6)
        check_choice("table", self.table, ("reason", "copy"))
        check_table("heads", self.heads)
        self.must_share_evenly()

    def bind(self, model: Any) -> "HeadKV":
        bound = super().bind(model)
        assert isinstance(bound, HeadKV)
        return filled(bound, model, {"heads": self.table})

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        if is_all(self.budget):
            return view.count
        table = table_of(self, view, "heads", query_heads(view))
        window = getattr(self.inner, "window", 0) if self.window is None else self.window
        return by_heads(view, self.budget, Shares(table, view.heads, window, float(self.beta)))


def by_heads(view: LayerView, budget: Budget, shares: "Shares") -> Int[Tensor, "B H"]:
    """How many tokens each (row, head) of this layer may keep."""
    lengths = zip(view.place.prompt.tolist(), view.place.seen.tolist(), strict=True)
    caps = [(prompt, prompt if isinstance(budget, float) else seen) for prompt, seen in lengths]
    found = [allocate_heads(budget, length, cap, shares)[view.place.ordinal] for length, cap in caps]
    return torch.tensor(found, device=view.valid.device, dtype=torch.int64).reshape(-1, view.heads)


@dataclass(frozen=True)
class Shares:
    """What each (layer, KV head) should get of a mean budget; sums to that mean times their number."""

    table: Table
    heads: int
    window: int
    beta: float

    def __call__(self, each: float) -> Table:
        importance = over_groups(self.table, self.heads).numpy().astype(np.float64)
        if importance.sum() <= 0.0:
            importance = np.ones_like(importance)
        base = max(0.0, each - self.window)
        pooled = base // self.beta
        share = importance / importance.sum() * (pooled * importance.size) + (each - pooled)
        return tuple(tuple(row) for row in share.tolist())
