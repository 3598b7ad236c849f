"""EMS: evict what nobody looks at, merge the middling into the important, head by head (arXiv:2412.08521)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.merges import FRAMES, absorb, at_home, counted, nearest, over_set, rope_for
from kvfold.methods.base import Method, method
from kvfold.methods.scored import exempt
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Keep

GLOBAL, LOCAL = "ems_global", "ems_local"


@method(
    "ems", title="EMS: evict, then merge", paper="2412.08521", kind="merge",
    formula=r"""
        s_t = \max\Big(g_t, \; l_t \frac{\mathrm{mean}(g)}{\mathrm{mean}(l)}\Big), \quad g_t = \sum_i A_{i,t},
            \quad l_t = \sum_{i \in W} A_{i,t}
        R_{t,c} = \cos(k_t, k_c) \cos(v_t, v_c), \quad R_{t,0} = \tau
        v_c \leftarrow \sum_t \alpha_t v_t, \quad k_c \leftarrow \sum_t \alpha_t \lVert k_t \rVert \cdot
            \frac{u}{\lVert u \rVert}, \quad u = \sum_t \alpha_t \frac{k_t}{\lVert k_t \rVert},
            \quad \alpha_t = \frac{s_t}{\sum s}
    """,
    options={
        "window": "last queries that make the local score, and tokens that always stay",
        "similar": "redundancy that a merge needs; below it a token joins the class that is thrown away",
        "share": "part of a head's score up to which tokens are worth merging",
        "many": "most tokens to merge, as a multiple of those that stay",
        "combine": 'how the two scores become one: "max" or "sum"',
        "mass": 'what tells a query how many tokens a slot stands for: "convex" (nothing) or "counted" (ours)',
        "frame": 'keys are compared and averaged as they are stored ("rotated") or as before RoPE ("unrotated")',
    },
)  # fmt: skip
@dataclass(frozen=True)
class EMS(Method):
    """The best by a global and a local score stay; of the next best, those that resemble one fold into it.

    The global score is the attention of all queries so far, the local one that of the last `window`, brought to the
    same mean. Redundancy is the product of the cosines of keys and values, both above 0. Keys keep the mean of their
    norms. Every head keeps as many tokens as its budget; how many are merged differs. Acts on prompts and on every
    generated token; the local score then fades by 1 / `window` a step.
    Differs from the paper: a budget without room for the window and 4 more tokens keeps both ends of the text; there is
    no code, and the text was read in part. `window`, `similar`, `share`, `many`, the maximum, the weights, what a
    merged token's scores are (sums) and decoding are reconstructed. The query heads of a group add up.
    """

    budget: Budget = 0.25
    window: int = 32
    similar: float = 0.6
    share: float = 0.95
    many: float = 4.0
    combine: str = "max"
    mass: str = "convex"
    frame: str = "rotated"

    asks = frozenset({"column_sums", "attention"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_int("window", self.window, 1)
        check_number("similar", self.similar, 0.0)
        check_number("share", self.share, 0.0, 1.0)
        check_number("many", self.many, 0.0)
        check_choice("combine", self.combine, ("max", "sum"))
        check_choice("mass", self.mass, ("convex", "counted"))
        check_choice("frame", self.frame, FRAMES)

    def after_prefill(self, view: LayerView) -> list[Decision]:
        count = view.budget(self.budget)
        of_all, of_last = self.measured(view)
        scores = self.combined(view, of_all, of_last)
        kept = keep_top(view, scores, count, always=exempt(view, count, self.window)).mask
        rope = rope_for(view, self.frame)
        keys = view.keys if rope is None else rope.shift(view.keys.float(), -view.positions)
        home, redundancy = nearest(self.middling(view, scores, kept, count), kept, keys, view.values)
        home = torch.where(redundancy > self.similar, home, at_home(home))
        weight = scores.clamp(min=1e-12)
        weight = weight / over_set(weight, home)
        norm = keys.float().norm(dim=-1)
        written = absorb(view, home, weight / norm.clamp(min=1e-12), weight, rope)
        norm = over_set(weight * norm, home).gather(-1, written.slots.clamp(min=0))
        assert written.keys is not None
        written = replace(
            written, keys=(F.normalize(written.keys.float(), dim=-1) * norm[..., None]).to(view.keys.dtype)
        )
        columns = {GLOBAL: over_set(of_all, home), LOCAL: over_set(of_last, home)}
        if self.mass == "counted":
            columns |= counted(view, home)
        return [written, Keep(kept, columns)]

    after_decode = after_prefill

    def measured(self, view: LayerView) -> tuple[Float[Tensor, "B H T"], Float[Tensor, "B H T"]]:
        """Attention that each token got of all queries so far, and of the last ones."""
        of_all, of_last = view.column_sums(), view.attention(self.window).sum((2, 3))
        if GLOBAL in view.columns:
            asked = view.queries.valid.sum(1).clamp(max=self.window)[:, None, None]
            fade = (1 - 1 / self.window) ** asked.float()
            of_all, of_last = of_all + view.columns[GLOBAL], of_last + view.columns[LOCAL] * fade
        return of_all.masked_fill(~view.valid, 0.0), of_last.masked_fill(~view.valid, 0.0)

    def combined(
        self, view: LayerView, of_all: Float[Tensor, "B H T"], of_last: Float[Tensor, "B H T"]
    ) -> Float[Tensor, "B H T"]:
        """One score of two, the local one brought to the mean of the global one."""
        aligned = of_last * (of_all.sum(-1, keepdim=True) / of_last.sum(-1, keepdim=True).clamp(min=1e-12))
        scores = torch.maximum(of_all, aligned) if self.combine == "max" else of_all + aligned
        return scores.masked_fill(~view.valid, 0.0)

    def middling(
        self, view: LayerView, scores: Float[Tensor, "B H T"], kept: Bool[Tensor, "B H T"], count: Int[Tensor, "B H"]
    ) -> Bool[Tensor, "B H T"]:
        """The best of those that go, until all so far hold `share` of the score, at most `many` times `count`."""
        order = torch.argsort(scores.masked_fill(kept, torch.inf), dim=-1, descending=True, stable=True)
        ranked = scores.gather(-1, order)
        before = ranked.cumsum(-1) - ranked
        place = torch.arange(order.shape[-1], device=order.device)
        most = (count * (1 + self.many))[..., None]
        chosen = (before < self.share * ranked.sum(-1, keepdim=True)) & (place < most)
        return torch.zeros_like(kept).scatter_(-1, order, chosen) & view.valid & ~kept
