"""CAKE: layers share a budget by how spread and how restless their attention is (arXiv:2503.12491)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from kvfold.budgets import is_all
from kvfold.methods._cascade import Cascade
from kvfold.methods.base import method
from kvfold.methods.scored import exempt
from kvfold.options import check_int, check_number
from kvfold.scores import drop_lowest
from kvfold.scores.smoothed import smoothed
from kvfold.views import LayerView
from kvfold.views.decisions import Drop, Keep


@method(
    "cake", title="CAKE", paper="2503.12491", kind="evict",
    formula=r"""
        s_t = \mathrm{pool}_k\big(\mathrm{mean}_{i \in W} A_{i,t} + \gamma \mathrm{var}_{i \in W} A_{i,t}\big)
        P_l = H_l^{1/\tau_1} V_l^{1/\tau_2}, \quad H_l = -\sum_{t,i} A_{i,t} \ln A_{i,t},
            \quad V_l = \sum_t \mathrm{var}_{i} A_{i,t}
        b_l = w + \frac{P_l}{\sum_m P_m} L (b - w)
    """,
    options={
        "window": "queries at the prompt's end whose attention counts (w); their tokens always stay",
        "gamma": "weight of the variance over the queries",
        "tau1": "temperature of the entropy: the higher, the less it matters",
        "tau2": "temperature of the variance: the higher, the less it matters",
        "kernel": "width of the average pooling along the sequence, odd (k)",
    },
)  # fmt: skip
@dataclass(frozen=True)
class CAKE(Cascade):
    """Tokens by mean + `gamma` variance of the last `window` queries' attention; the window itself always stays.

    A layer's share is H^(1/`tau1`) V^(1/`tau2`): H is the entropy of that attention before the window, V its
    variance over the queries, both summed. After each layer all layers so far share the whole budget anew. In
    decoding each layer drops what the newest query, smoothed, looks at least outside the window. The paper tunes
    the temperatures for each model and budget; 1 is what its code falls back to.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends of the text; each row
    of a batch has shares of its own; what a layer can't hold goes to the others in proportion to their preference, not
    equally; a prompt that is less than a window over the budget is cut, too. With no variance anywhere, as with one
    query, layers share evenly.
    """

    window: int = 32
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    kernel: int = 5

    asks = frozenset({"attention"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_number("gamma", self.gamma, 0.0)
        check_number("tau1", self.tau1, 1e-3, 1e3)
        check_number("tau2", self.tau2, 1e-3, 1e3)

    @property
    def fixed(self) -> int:
        return self.window

    def measure(self, view: LayerView) -> tuple[Float[Tensor, "B H T"], Float[Tensor, " B"]]:
        attention = view.attention(self.window)  # B H G W T
        asked = view.queries.valid.sum(1).clamp(max=attention.shape[3])[:, None, None, None]  # queries of each row
        absent = torch.arange(attention.shape[3], 0, -1, device=asked.device)[:, None] > asked[..., None]  # B 1 1 W 1
        attention = attention.masked_fill((view.last(self.window) | ~view.valid)[:, :, None, None], 0.0)
        mean = attention.sum(3) / asked.clamp(min=1)
        apart = (attention - mean[:, :, :, None]).masked_fill(absent, 0.0)
        variance = apart.square().sum(3) / (asked - 1).clamp(min=1)  # unbiased; 0 of a lone query
        entropy = -(attention * (attention + 1e-10).log()).sum((1, 2, 3, 4))
        spread, shift = entropy.double().clamp(min=0), variance.double().sum((1, 2, 3))
        indicator = self._smooth(view, (mean + self.gamma * variance).mean(2))
        return indicator, spread ** (1 / self.tau1) * shift ** (1 / self.tau2)

    def _smooth(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
        return smoothed(view, scores, view.last(self.window), self.kernel)

    def weights(self, signals: list[Tensor], free: Float[Tensor, " B"], layers: int) -> Shaped[Tensor, "B N"]:
        return torch.stack(signals, 1)

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.window)

    def after_decode(self, view: LayerView) -> Keep | Drop | None:
        if is_all(self.budget):
            return None
        # A layer is as large as its share, unless the text is still shorter than the budget.
        counts = torch.where(self.short(view), view.count, view.earlier.sum(-1))
        looked = self._smooth(view, view.attention(1)[:, :, :, 0].mean(2))
        return drop_lowest(view, looked, counts, self.always(view, counts))
