"""R-KV: keep what the newest queries look at and no other key repeats (arXiv:2505.24133)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods._intervals import AtIntervals, check_interval
from kvfold.methods.base import method
from kvfold.methods.scored import Scored, exempt
from kvfold.options import check_int, check_number
from kvfold.scores.redundant import redundancy
from kvfold.scores.smoothed import smoothed
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

BUFFER = 128
"""Generated tokens that gather in the code before it cuts."""


@method(
    "r-kv", title="R-KV: redundancy-aware KV cache compression", paper="2505.24133", kind="evict",
    formula=r"""
        P_{h,i,t} = \frac{\max_g A_{h,g,i,t}}{\sum_{u \notin W} \max_g A_{h,g,i,u}}, \quad
            I_{h,t} = \max_{|u-t| \le k/2} \frac{1}{w}\sum_{i \in W} P_{h,i,u}
        R_h = \mathrm{softmax}_t\Big(\frac{1}{T}\sum_{u \ne t,\; t \ne n(u)} \cos(k_{h,u}, k_{h,t})\Big), \quad
            n(u) = \max\{t : \cos(k_{h,u}, k_{h,t}) > \tau\}
        s_{h,t} = \lambda I_{h,t} - (1 - \lambda) R_{h,t}, \quad K_h = W \cup \mathrm{top}_{b-w}(s_h)
    """,
    options={
        "window": "newest queries whose attention counts (w); their tokens always stay",
        "kernel": "width over which the highest attention is spread along the text, odd (k)",
        "mix": "what attention counts beside redundancy, 0 to 1 (lambda)",
        "threshold": "the cosine from which two keys repeat each other (tau)",
        "interval": "generated tokens from one cut to the next; None: 128, or half of a budget that is less; 0: no cut",
    },
)  # fmt: skip
@dataclass(frozen=True)
class RKV(AtIntervals, Scored):
    """Attention of the newest queries less the redundancy of the key; the queries' own tokens always stay.

    Importance: each of the last `window` (8) queries' softmax over the tokens before the window, the mean over the
    queries, the maximum over `kernel` (7) neighbours. Redundancy: the mean cosine of a key to all of its head (as the
    cache holds them, after RoPE), where each key's cosine to the newest one that it is liker to than `threshold` (0.5)
    counts as 0, so that the newest of those that repeat each other stays; then a softmax over the tokens. Both sum to
    about 1, so that `mix` (0.1; 0.07 in places of the code) weighs like with like.
    Acts at the end of a prompt, and every `interval` (128) generated tokens on all that is held. A budget without room
    for the window and 4 more tokens keeps both ends of the text (ours). Differs from the code: a budget in tokens has
    the interval's in it (there they come on top); the query heads of a group are compared by their probabilities, each
    query's maxima then made to sum to 1 (the code takes the maximum of the logits first; with one query head a KV head
    it is the same); a key that none repeats spares nobody (there, the first token).
    """

    window: int = 8
    kernel: int = 7
    mix: float = 0.1
    threshold: float = 0.5
    interval: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, 1)
        check_int("kernel", self.kernel, 1, odd=True)
        check_number("mix", self.mix, 0.0, 1.0)
        check_number("threshold", self.threshold, -1.0, 1.0)
        check_interval("interval", self.interval, self.budget)

    @property
    def usual(self) -> int:
        """The paper's buffer, as far as a budget has room for it."""
        return max(1, min(BUFFER, self.budget // 2)) if isinstance(self.budget, int) else BUFFER

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        repeated = redundancy(view, self.threshold).masked_fill(~view.valid, -torch.inf).softmax(-1)
        return self.mix * self.importance(view) - (1.0 - self.mix) * repeated

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        return view.budget(self.room)

    def after_interval(self, view: LayerView) -> Keep:
        return self.after_prefill(view)

    def importance(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """What the newest queries give each token before them; 0 for their own."""
        window = view.last(self.window)
        asked = view.attention(self.window).amax(2).masked_fill(window[:, :, None], 0.0)  # B H W T
        total = asked.sum(-1, keepdim=True)
        shares = asked / total.clamp(min=torch.finfo(asked.dtype).tiny)
        queries = (total > 0).sum(2).clamp(min=1)  # B H 1; a short row has fewer than the window
        return smoothed(view, shares.sum(2) / queries, window, self.kernel, "max")

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return exempt(view, counts, self.window)
