"""CompressKV: a few semantic retrieval heads of each layer choose for all its heads (arXiv:2508.02401)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import is_all
from kvfold.methods._calibrated import Table, check_table, filled, query_heads, table_of
from kvfold.methods.base import method
from kvfold.methods.scored import Scored, exempt
from kvfold.options import check_int
from kvfold.scores.pooled import common
from kvfold.scores.smoothed import smoothed
from kvfold.views import LayerView


@method(
    "compresskv", title="CompressKV", paper="2508.02401", kind="evict",
    formula=r"""
        s_t = \mathrm{pool}_k\Big(\frac{1}{|R|}\sum_{j \in R}\sum_{i \in W} A_{j,i,t}\Big)
        b_l = \min\Big(3b,\ m + \frac{e_l}{\sum_j e_j} L (b - m)\Big)
    """,
    options={
        "window": "queries at the prompt's end whose attention counts (W); their tokens always stay",
        "kernel": "width of the average pooling along the sequence, odd (k)",
        "first": "semantic retrieval heads that vote in each layer (R)",
        "least": "tokens that every layer keeps (m)",
        "heads": "retrieval scores of the query heads, a row a layer; None: from the calibration",
        "errors": "what compression costs each layer (e); None: from the calibration",
    },
)  # fmt: skip
@dataclass(frozen=True)
class CompressKV(Scored):
    """Votes of the last `window` queries in the `first` best semantic retrieval heads, one choice for the layer.

    A layer's budget: `least` tokens, and of the rest its part of the error that compression makes there, at most
    three times the mean. `heads` (scores of the query heads: attention to the whole needle while it is recited) and
    `errors` (of the layers) come from `kvfold calibrate compresskv`. Acts at the end of a prompt.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends of the text; no layer
    gets more than the prompt has, and the others get what is over; a budget under `least` is shared evenly. The bounds
    are those of the code.
    """

    window: int = 8
    kernel: int = 5
    first: int = 4
    least: int = 32
    heads: Table | None = None
    errors: tuple[float, ...] | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_int("first", self.first, 1)
        check_int("least", self.least, 1)
        check_table("heads", self.heads)
        check_table("errors", None if self.errors is None else (self.errors,))

    def bind(self, model: Any) -> "CompressKV":
        return filled(self, model, {"heads": "heads", "errors": "errors"})

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        table = table_of(self, view, "heads", query_heads(view))
        ranked = torch.tensor(table[view.place.ordinal], dtype=torch.float32).argsort(descending=True, stable=True)
        chosen = (
            torch.zeros(len(ranked), dtype=torch.float32).index_fill(0, ranked[: self.first], 1.0).view(view.heads, -1)
        )  # H G
        received = view.attention(self.window).sum(3)  # B H G T
        votes = common(view, torch.einsum("bhgt,hg->bht", received, chosen.to(received.device)), chosen.sum(1))
        return smoothed(view, votes, view.last(self.window), self.kernel)

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        if is_all(self.budget):
            return view.count
        if self.errors is None or len(self.errors) != view.place.layers:
            raise ValueError(f"errors={self.errors!r} of compresskv must be {view.place.layers} numbers, one a layer")
        found = []
        for prompt, seen in zip(view.place.prompt.tolist(), view.place.seen.tolist(), strict=True):
            cap = prompt if isinstance(self.budget, float) else seen
            each = int(self.budget * prompt + 1e-9) if isinstance(self.budget, float) else self.budget
            found.append(layer_budgets(min(each, cap), cap, self.errors, self.least)[view.place.ordinal])
        return torch.tensor(found, device=view.valid.device, dtype=torch.int64)[:, None].expand(-1, view.heads)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.window)


@lru_cache(maxsize=4096)
def layer_budgets(mean: int, cap: int, errors: tuple[float, ...], least: int) -> tuple[int, ...]:
    """Tokens of each layer, `mean` times their number in all: between `least` and 3 `mean` (and `cap`), by error."""
    count, low, high = len(errors), min(least, mean), min(3 * mean, cap)
    total, norm = mean * count, sum(errors) or 1.0
    found = [min(max(low + round(error / norm * (total - low * count)), low), high) for error in errors]
    order = sorted(range(count), key=lambda layer: (-errors[layer], layer))
    while rest := total - sum(found):
        room = [i for i in order if found[i] < high] if rest > 0 else [i for i in reversed(order) if found[i] > low]
        step = max(1, min(abs(rest) // len(room), *(high - found[i] if rest > 0 else found[i] - low for i in room)))
        for layer in room[: abs(rest)]:
            found[layer] += step if rest > 0 else -step
    return tuple(found)
