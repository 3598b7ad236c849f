"""MPCache: one cut after the prompt, then a coarse and a fine choice of clusters at every token (arXiv:2501.06807)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import is_all
from kvfold.methods.base import method
from kvfold.methods.scored import Scored, recent
from kvfold.options import check_int, check_number
from kvfold.scores import top_mask
from kvfold.scores.peaks import peaks
from kvfold.views import LayerView
from kvfold.views.decisions import Read

LONG, FEWER = 24_000, 0.5
"""Prompts of more tokens are judged by fewer of their queries: half the share."""
SHARED = "mpcache"


@method(
    "mpcache", title="MPCache", paper="2501.06807", kind="evict",
    formula=r"""
        s_t = \max_{i \in W} \frac{1}{HG}\sum_{h,g} A_{h,g,i,t}
        u_c = q^\top\big(\alpha \max_{t \in c} k_t + (1 - \alpha) \min_{t \in c} k_t\big)
    """,
    options={
        "threshold": "least score of a token that stays, within the budget; None: the budget alone says",
        "asking": "share of the prompt's queries, from its end, that judge (W); half of it over 24,000 tokens",
        "alpha": "weight of a cluster's upper corner against its lower one",
        "coarse": "tokens of a large cluster",
        "fine": "tokens of a small cluster; divides `coarse`",
        "coarse_ratio": "share of the large clusters that go on",
        "ratio": "share of the small clusters that a generated token reads",
        "share": "layers in a row that read what the first of them chose",
    },
)  # fmt: skip
@dataclass(frozen=True)
class MPCache(Scored):
    """Drops what none of the prompt's last queries looks at, then lets each generated token read a few clusters.

    A token counts as much as its highest attention, a mean over the layer's heads, from the last `asking` of the
    prompt's queries; `threshold` keeps only what reaches it, within the budget. When decoding, a cluster of
    consecutive tokens is worth q (alpha max k + (1 - alpha) min k): the best `coarse_ratio` of large clusters go
    on, and of their halves as many as `ratio` of all. `share` layers in a row read the stretches of text that their
    first chose (groups of 2, and text in place of indices, since each layer drops tokens of its own:
    reconstructed). As in the official code the clusters' bounds are worked out anew at every step. A budget of 1.0
    without threshold is the full cache: everything is kept and read.
    Differs from the paper: attention is causal and scaled (the official code's is neither, and its thresholds fit
    only that); a budget instead of a threshold for each data set; the newest token always stays; the mean query of
    a group chooses, so that one KV head reads one set; the last cluster, which holds the newest, is always read, and
    two large clusters, between which there is nothing to choose, are read whole.
    """

    threshold: float | None = None
    asking: float = 0.2
    alpha: float = 0.6
    coarse: int = 32
    fine: int = 16
    coarse_ratio: float = 0.5
    ratio: float = 0.2
    share: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold is not None:
            check_number("threshold", self.threshold, 0.0, 1.0)
        for name in ("asking", "alpha", "coarse_ratio", "ratio"):
            check_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("coarse", "fine", "share"):
            check_int(name, getattr(self, name), 1)
        if self.coarse % self.fine:
            raise ValueError(f"coarse={self.coarse!r} must be a multiple of fine={self.fine!r}")

    def scores(self, view: LayerView) -> Float[Tensor, "B H T"]:
        valid = view.queries.valid
        own = valid.sum(1, keepdim=True)
        share = self.asking * torch.where(own > LONG, FEWER, 1.0).double()
        window = (own.double() * share).long().clamp(min=1)
        return peaks(view, valid & (own - valid.cumsum(1) < window), heads="mean")

    def counts(self, view: LayerView, scores: Float[Tensor, "B H T"]) -> Int[Tensor, "B H"]:
        allowed = super().counts(view, scores)
        if self.threshold is None:
            return allowed
        enough = ((scores >= self.threshold) & view.valid).sum(-1).clamp(min=1)  # the newest token stays
        return torch.minimum(allowed, enough.to(allowed.device))

    def always(self, view: LayerView, counts: Int[Tensor, "B H"]) -> Bool[Tensor, "B H T"]:
        return recent(view, counts.clamp(max=1))

    def before_attend(self, view: LayerView) -> Read | None:
        if is_all(self.budget) and self.threshold is None:
            return None
        step, count = view.place.step, view.count
        places = view.pack(view.positions.masked_fill(~view.valid, torch.iinfo(torch.int32).max)).contiguous()
        if view.place.ordinal % self.share == 0 or SHARED not in step:
            step[SHARED] = places[..., :: self.fine].contiguous(), self.choose(view)
        starts, chosen = (shared.to(places.device) for shared in step[SHARED])  # layers may lie on several
        # Each layer has dropped tokens of its own: what is shared are stretches of text, not numbers of clusters.
        stretch = (torch.searchsorted(starts, places, right=True) - 1).clamp(min=0, max=chosen.shape[-1] - 1)
        cluster = torch.arange(places.shape[-1], device=chosen.device) // self.fine
        read = chosen.gather(2, stretch) | (cluster == 0) | (cluster == (count[..., None] - 1) // self.fine)
        return Read(view.valid & view.unpack(read))

    def choose(self, view: LayerView) -> Bool[Tensor, "B H N"]:
        """Which small clusters of the tokens, in order, the newest query reads."""
        (b, h, t), halves = view.valid.shape, self.coarse // self.fine
        count, keys = view.count[..., None], view.pack(view.keys)
        keys = torch.nn.functional.pad(keys, (0, 0, 0, -t % self.coarse))
        none = (torch.arange(keys.shape[2], device=keys.device) >= count)[..., None]
        split = (b, h, -1, self.fine, keys.shape[-1])
        high = keys.masked_fill(none, -torch.inf).view(split).amax(3).float()
        low = keys.masked_fill(none, torch.inf).view(split).amin(3).float()
        query = view.queries.states[:, :, -1].float().view(b, h, -1, keys.shape[-1]).mean(2)
        worth = self._worth(query, high, low)
        parts = (b, h, -1, halves, keys.shape[-1])
        large = self._worth(query, high.view(parts).amax(3), low.view(parts).amin(3))
        going = self._best(large, (count + self.coarse - 1) // self.coarse, self.coarse_ratio)
        rivals = worth.masked_fill(~going.repeat_interleave(halves, -1), -torch.inf)
        best = self._best(rivals, (count + self.fine - 1) // self.fine, self.ratio)
        return best | (count <= 2 * self.coarse)

    def _worth(self, query: Tensor, high: Tensor, low: Tensor) -> Float[Tensor, "B H N"]:
        """-inf for a cluster without tokens."""
        mixed = self.alpha * high + (1 - self.alpha) * low
        worth = torch.einsum("bhd,bhnd->bhn", query, mixed.nan_to_num(0.0, posinf=0.0, neginf=0.0))
        return worth.masked_fill(torch.isinf(high).any(-1), -torch.inf)

    @staticmethod
    def _best(worth: Float[Tensor, "B H N"], number: Int[Tensor, "B H 1"], ratio: float) -> Bool[Tensor, "B H N"]:
        """At least one, and always the first and the last of each row's `number` clusters."""
        best = top_mask(worth, (number[..., 0].double() * ratio).long().clamp(min=1))
        at = torch.arange(worth.shape[-1], device=worth.device)
        return best | (at == 0) | (at == number - 1)
