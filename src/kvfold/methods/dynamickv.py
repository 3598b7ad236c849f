"""DynamicKV: layers share a budget by where the best scores of the whole model are (arXiv:2412.14838)."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.budgets.layers import tokens_each
from kvfold.methods._cascade import Cascade
from kvfold.methods.base import method
from kvfold.methods.scored import exempt
from kvfold.methods.snapkv import SnapKV
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores.pooled import line_up, split_top
from kvfold.views import LayerView


@method(
    "dynamickv", title="DynamicKV", paper="2412.14838", kind="evict",
    formula=r"""
        s_l = \text{votes of layer } l \text{ as in SnapKV}
        b_l = w + \frac{1}{H}\Big|\mathrm{top}_{LH(b-w)}\big(s_1 \cup \dots \cup s_L\big) \cap s_l\Big|
    """,
    options={
        "window": "queries at the prompt's end whose attention counts (w); their tokens always stay",
        "kernel": "width of the pooling along the sequence, odd",
        "pool": '"avg" or "max"',
        "buffer": "most that a layer holds while the prompt is read, in mean budgets",
        "refresh": "layers after which the budget is shared anew",
    },
)  # fmt: skip
@dataclass(frozen=True)
class DynamicKV(Cascade):
    """SnapKV's votes; a layer's share is how many of the best votes in all layers are its own.

    While the prompt is read a layer holds at most `buffer` times the mean budget. Every `refresh` layers, and after
    the last, one top-k over all layers so far shares the whole budget among them (`refresh=4` and `buffer=10` are
    the paper's); a layer that was cut does not grow again. Generated tokens are appended. The paper pools with
    "avg" for Llama and "max" for Mistral and Qwen.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends of the text; scores
    are those of KV heads (mean of the group); each row has shares of its own; what a layer can't hold goes to the
    others (the code loses it), and the integers sum to the budget.
    """

    window: int = 8
    kernel: int = 7
    pool: str = "avg"
    buffer: float = 10.0
    refresh: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_choice("pool", self.pool, ("avg", "max"))
        check_number("buffer", self.buffer, 1.0)
        check_int("refresh", self.refresh, 1)

    @property
    def fixed(self) -> int:
        return self.window

    def measure(self, view: LayerView) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B H T"]]:
        votes = SnapKV(window=self.window, kernel=self.kernel, pool=self.pool).scores(view)
        competing = view.valid & ~view.last(self.window)
        return votes, view.pack(votes.masked_fill(~competing, -torch.inf))

    def at_most(self, view: LayerView) -> Int[Tensor, "B H"]:
        each = torch.tensor(tokens_each(self.budget, view.place.prompt, view.place.seen), dtype=torch.float32)
        room = each.clamp(max=self.window) + self.buffer * (each - self.window).clamp(min=0)
        return room.clamp(max=float(view.valid.shape[-1])).ceil().long().to(view.valid.device)[:, None]

    def due(self, ordinal: int, layers: int) -> bool:
        return ordinal % self.refresh == self.refresh - 1

    def spare(self, newest: np.ndarray) -> np.ndarray:
        return np.zeros_like(newest)  # what the paper holds over the budget are the layers since the last refresh

    def weights(self, signals: list[Tensor], free: Float[Tensor, " B"], layers: int) -> Shaped[Tensor, "B N"]:
        best = (free * signals[0].shape[1] * len(signals) + 1e-6).floor().long()
        return split_top(line_up([votes.flatten(1) for votes in signals]), best.to(signals[0].device))

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.window)
