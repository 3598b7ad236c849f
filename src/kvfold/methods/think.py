"""ThinK: keys without the channels that the end of the prompt cares least for (arXiv:2407.21018)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold import ops
from kvfold.formats.thin import CHANNELS, Thin
from kvfold.methods.base import Decisions, Method, method
from kvfold.options import check_int
from kvfold.views import LayerView
from kvfold.views.decisions import Store


@method(
    "think", title="ThinK: thinner keys by query-driven pruning", paper="2407.21018", kind="sparse",
    formula=r"""
        s_{h,d} = \frac{1}{G |W|}\sum_{g} \sum_{i \in W} q_{h,g,i,d}^2 \cdot \frac{1}{T}\sum_{t} k_{h,t,d}^2
        \hat k_{h,t,d} = k_{h,t,d} \cdot [d \in \mathrm{top}_{D - \lfloor \lambda D \rfloor}(s_h)]
    """,
    options={
        "ratio": "share of a key's channels that go (lambda); 0 to 0.99",
        "recent": "newest tokens of a prompt that keep all channels",
        "window": "queries at the prompt's end that say which channels count (W)",
    },
)  # fmt: skip
@dataclass(frozen=True)
class ThinK(Method):
    """Keeps every token and its whole value; keys lose the channels in which queries times keys are smallest.

    Acts at the end of a prompt, on all tokens but the `recent` newest, after RoPE. The channels are a KV head's, the
    same for all its tokens; generated tokens keep theirs. A further prompt, or a further chunk of one, prunes what has
    come since in the channels that the first one chose. Behind a method that drops tokens it thins the rest:
    "snapkv(budget=0.25) | think" (the means are then over what is left). A key's room is a multiple of 4 numbers.
    Differs from the paper: the query heads of a group vote together (as in NVIDIA's kvpress), so that one KV head keeps
    one set of channels; the authors repeat keys for each query head, and never prune what comes after the first prompt.
    """

    ratio: float = 0.4
    recent: int = 32
    window: int = 32

    stores = True

    def __post_init__(self) -> None:
        Thin(self.ratio)  # raises for a ratio that can't be
        check_int("recent", self.recent, 0)
        check_int("window", self.window, 1)

    def after_prefill(self, view: LayerView) -> Decisions:
        form, scores = Thin(self.ratio), self.scores(view)
        size, mask = scores.shape[-1], view.valid & ~view.last(self.recent)
        if form.kept(size) == size:
            return None
        kept = torch.full(scores.shape[:2], form.kept(size), dtype=torch.int64, device=scores.device)
        return Store(form, mask, {CHANNELS: ops.top_mask(scores, kept)})

    def scores(self, view: LayerView) -> Float[Tensor, "B H D"]:
        """Mean square of the last queries, over the heads of a group too, times that of the keys, by channel."""
        queries = view.queries.last(self.window)
        asked, keys = queries.states.float().square(), view.keys.float().square()
        asked = asked.masked_fill(~queries.valid[:, None, :, None], 0.0).sum(2)  # B Hq D
        keys = keys.masked_fill(~view.valid[..., None], 0.0).sum(2)
        askers = queries.valid.sum(1).clamp(min=1)[:, None, None]
        b, hq, d = asked.shape
        grouped = (asked / askers).view(b, view.heads, hq // view.heads, d).mean(2)
        return grouped * (keys / view.count.clamp(min=1)[..., None])
