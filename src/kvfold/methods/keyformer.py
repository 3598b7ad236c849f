"""Keyformer: key tokens by a noisy softmax that flattens over time, and a recent window (arXiv:2403.09054)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.h2o import H2O
from kvfold.options import check_int, check_number
from kvfold.scores.noise import crossed, gumbel, hashed
from kvfold.scores.rows import logit_rows
from kvfold.views import LayerView

SCORE = "keyformer_score"


@method(
    "keyformer", title="Keyformer", paper="2403.09054", kind="evict",
    formula=r"""
        s_t \leftarrow s_t + \frac{1}{G}\sum_g\sum_i \mathrm{softmax}_t\Big(\frac{x_{g,i,t} +
            \zeta_{i,t}}{\tau}\Big), \quad \zeta \sim \mathrm{Gumbel}
        \tau = \min(\tau_{end}, \tau_{init} + n \Delta\tau) \quad \text{after } n \text{ generated tokens}
    """,
    options={
        "recent": "share of the budget for the most recent tokens",
        "tau_init": "temperature at the prompt",
        "tau_end": "highest temperature",
        "tau_delta": "what each generated token adds to the temperature",
        "seed": "of the Gumbel noise",
    },
)  # fmt: skip
@dataclass(frozen=True)
class Keyformer(H2O):
    """H2O with another score: softmax((logits + Gumbel noise) / tau), summed over all queries so far.

    Only the score is noised, attention is not. `tau` grows by `tau_delta` with each generated token, from `tau_init`
    at a prompt; a known length N of the answer makes that (tau_end - tau_init) / N. `recent` is the share of the
    budget for the recent window. Noise comes from `seed`, layer, head and the two tokens' places in the text.
    Differs from the paper: `tau` stays at `tau_end` once there (ours, for answers of unknown length). Each row has
    its own set, where the public code sums over the batch. The query heads of a group share the mean of their
    scores. A prompt in chunks is cut after each.
    """

    recent: float = 0.3
    tau_init: float = 1.0
    tau_end: float = 2.0
    tau_delta: float = 0.01
    seed: int = 0

    asks = frozenset({"attention"})
    lone = False  # its softmax has noise in it, and is its own

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau_init", self.tau_init, 1e-3, 1e3)
        check_number("tau_end", self.tau_end, self.tau_init, 1e3)
        check_number("tau_delta", self.tau_delta, 0.0, 1e3)
        check_int("seed", self.seed, 0, high=2**63 - 1)

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        tau = self.tau(view).to(view.valid.device)[:, None, None, None, None]
        total = torch.zeros(view.valid.shape, dtype=torch.float32, device=view.valid.device)
        group = view.queries.states.shape[1] // view.heads
        heads = torch.arange(view.heads * group, device=view.valid.device).view(view.heads, group, 1, 1)
        of_key = hashed(view.positions)[:, :, None, None]  # B H 1 1 T
        for asked_at, _, logits in logit_rows(view):
            of_query = hashed(asked_at[:, None, None, :, None], self.seed, view.place.layer, heads)  # B H G W 1
            noise = gumbel(crossed(of_query, of_key[..., : logits.shape[-1]]))
            probs = logits.add_(noise).div_(tau).softmax(-1).nan_to_num(0.0)  # a padded query sees nothing
            total[..., : logits.shape[-1]] += probs.mean(2).sum(2)
        return total + view.columns[SCORE] if SCORE in view.columns else total

    def tau(self, view: LayerView) -> Float[Tensor, " B"]:
        """The temperature of each row at this step."""
        steps = (view.place.seen - view.place.prompt).float()
        return (self.tau_init + steps * self.tau_delta).clamp(max=float(self.tau_end))

    def carried(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Mapping[str, Tensor]:
        return {SCORE: scores}
