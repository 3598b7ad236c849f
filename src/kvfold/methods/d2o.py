"""D2O: layers share a budget, and what heavy hitters leave folds into its likest (arXiv:2406.13035)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.budgets.allocate import exempt_layers
from kvfold.budgets.layers import tokens_each
from kvfold.merges import absorb, at_home, counted, log_mass, nearest, over_set
from kvfold.methods.base import Method, method
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int, check_ints, check_number
from kvfold.scores import keep_top
from kvfold.views import CacheView, LayerView, Place
from kvfold.views.decisions import Decision, Keep

SCORE, THRESHOLD = "d2o_score", "d2o_threshold"
APART = 2.0
"""Added to a threshold in its column, where 0 means that there is none yet."""


@method(
    "d2o", title="D2O: Dynamic Discriminative Operations", paper="2406.13035", kind="merge",
    formula=r"""
        b_l \propto \mathrm{softmax}_l(-F_l), \quad
            F_l = \mathrm{mean}_h\,\mathrm{minmax}_h\,\mathrm{var}_t \sum_i A_{h,i,t}
        u_{e} = \max_{c \in C} \cos(k_e, k_c), \quad
            \tau \leftarrow (1-\beta)\tau + \beta\,\mathrm{mean}_e u_e, \quad
            e \to c \Leftrightarrow u_e \ge \tau
        w_e = \frac{\exp(u_e)}{\exp(1) + \sum_{j \to c} \exp(u_j)}, \quad
            w_c = \frac{\exp(1)}{\exp(1) + \sum_{j \to c} \exp(u_j)}
    """,
    options={
        "recent": "share of a layer's budget for the most recent tokens",
        "sinks": "first tokens that always stay",
        "beta": "weight of the newest mean similarity in the moving threshold",
        "weights": 'how a set adds up: "convex" (the paper) or "cosine_mean" (the official code)',
        "mass": 'what tells a query how many tokens a slot stands for: "convex" (nothing) or "counted" (ours)',
        "skip": "layers that are left whole as long as the budget allows; -1 is the last",
    },
)  # fmt: skip
@dataclass(frozen=True)
class D2O(Method):
    """H2O's tokens, layers sharing the budget; a dropped token that is similar enough folds into the likest kept one.

    A layer whose heads differ more in how peaked their attention is gets less. Similar enough is what reaches a
    moving mean of the best cosines, one for each layer and row, which lives in a column. When decoding, one token
    leaves each layer at a step and merges in the same way.
    Differs from the paper: it cuts at the end of the prompt, not one token later, and layers wait for the last one
    before they do. Shares are scaled so that they sum to the budget; `skip` layers are paid from it. Each KV head
    decides by itself (the code: by the mean over heads of tokens of like rank); query heads of a group add up.
    `recent=0.5`, one recent token for each heavy hitter, is the code's; the paper found three hitters for a recent one
    best (0.25). `beta` is the code's, too (the paper's: 0.7, reconstructed). Of a further turn only its own queries say
    how layers share. The means over query heads of their min-max (the code's; the paper has the variance itself) and
    `weights="convex"` as printed are reconstructed where paper and code differ.
    """

    budget: Budget = 0.2
    recent: float = 0.5
    sinks: int = 4
    beta: float = 0.5
    weights: str = "convex"
    mass: str = "convex"
    skip: tuple[int, ...] = (0, 1, -1)

    asks = frozenset({"attention"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("recent", self.recent, 0.0, 1.0)
        check_int("sinks", self.sinks, 0)
        check_number("beta", self.beta, 0.0, 1.0)
        check_choice("weights", self.weights, ("convex", "cosine_mean"))
        check_choice("mass", self.mass, ("convex", "counted"))
        check_ints("skip", self.skip)

    def after_prefill(self, view: LayerView) -> Keep | None:
        if is_all(self.budget):
            return None
        sums = sums_apart(view)
        view.place.step.setdefault(self.info.slug, {})[view.place.ordinal] = spread(view, sums)
        return Keep(view.valid, {SCORE: self.scores(view, sums.sum(2))})

    def after_forward(self, cache: CacheView) -> Mapping[int, list[Decision]]:
        found: dict[int, Tensor] = cache.step.get(self.info.slug, {})
        if len(found) < len(cache):
            return {}
        each = [found[i].to(found[0].device) for i in range(len(cache))]  # layers may lie on several
        signals = torch.stack(each, 1).cpu().numpy().astype(np.float64)
        decisions = {}
        for i in range(len(cache)):
            view = cache[i]
            counts = view.budget(self.budget, self.shares(signals, view.place, view.fraction(self.budget)))
            decisions[i] = self.merged(view, counts, view.columns[SCORE])
        return decisions

    def after_decode(self, view: LayerView) -> list[Decision] | None:
        if is_all(self.budget):
            return None
        # A layer is as large as its share, unless the text is still shorter than the budget.
        each = torch.tensor(tokens_each(self.budget, view.place.prompt, view.place.seen), dtype=torch.float32)
        short = (view.place.seen <= each).to(view.valid.device)[:, None]
        counts = torch.where(short, view.count, view.earlier.sum(-1))
        return self.merged(view, counts, self.scores(view, view.column_sums()))

    @staticmethod
    def scores(view: LayerView, attention: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
        """Attention that each token got so far, `attention` in this pass."""
        return attention + view.columns[SCORE] if SCORE in view.columns else attention

    def shares(self, signals: np.ndarray, place: Place, fractions: list[float]) -> list[tuple[float, ...]]:
        """Weights of the layers for each row."""
        skipped = place.ordinals(self.skip)
        others = [i for i in range(place.layers) if i not in skipped] or list(range(place.layers))
        rows = []
        for row, fraction in zip(np.exp(-signals), fractions, strict=True):
            weights = np.array(exempt_layers(skipped, place.layers, fraction))
            weights[others] *= row[others] / row[others].mean()
            rows.append(tuple(weights.tolist()))
        return rows

    def merged(self, view: LayerView, counts: Int[Tensor, "B H"], scores: Float[Tensor, "B H T"]) -> list[Decision]:
        """Keep `counts` tokens, and fold what goes into them."""
        counts = torch.minimum(counts, view.count)
        last = torch.minimum((counts * self.recent).long().clamp(min=1), counts)
        sinks = (counts - last).clamp(max=self.sinks)[..., None]
        kept = keep_top(view, scores, counts, recent(view, last) | (view.rank < sinks)).mask
        home, cosine = nearest(view.valid & ~kept, kept, view.keys)
        threshold, column = self.threshold(view, cosine)
        joins = cosine >= threshold[:, None, None] - 1e-6
        home = torch.where(joins, home, at_home(home))
        columns = {SCORE: scores, THRESHOLD: column}
        mass = torch.ones_like(cosine)
        if self.mass == "counted":
            mass = log_mass(view).exp()
            columns |= counted(view, home)
        alike = torch.where(joins, cosine, 1.0)  # a token is as like itself as can be
        raw = (alike.exp() if self.weights == "convex" else alike) * mass
        total = over_set(raw if self.weights == "convex" else mass, home)
        return [absorb(view, home, raw / total), Keep(kept, columns)]

    def threshold(
        self, view: LayerView, cosine: Float[Tensor, "B H T"]
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, "B H T"]]:
        """What a dropped token must reach in each row, and the column that carries it on."""
        found: Bool[Tensor, "B H T"] = cosine.isfinite()
        number = found.sum((1, 2))
        mean = cosine.masked_fill(~found, 0.0).sum((1, 2)) / number.clamp(min=1)
        held = view.columns.get(THRESHOLD, torch.zeros_like(cosine)).masked_fill(~view.valid, 0.0).amax((1, 2))
        moved = torch.where(held > 0, (1 - self.beta) * (held - APART) + self.beta * mean, mean) + APART
        held = torch.where(number > 0, moved, held)
        return held - APART, held[:, None, None].expand_as(cosine)


def sums_apart(view: LayerView) -> Float[Tensor, "B H G T"]:
    """The attention that each token got from all queries of this pass, query head by query head."""
    asked = replace(view.queries, read=None)
    group = asked.states.shape[1] // view.heads
    own = (replace(asked, states=asked.states[:, g::group], lse=asked.lse[:, g::group]) for g in range(group))
    return torch.stack([replace(view, queries=queries, memo={}).column_sums() for queries in own], 2)


def spread(view: LayerView, sums: Float[Tensor, "B H G T"]) -> Float[Tensor, " B"]:
    """How much the query heads of a layer differ in the variance of what their tokens got, from 0 to 1."""
    count, real = view.count[:, :, None], view.valid[:, :, None]
    apart = (sums - sums.sum(-1, keepdim=True) / count.clamp(min=1)[..., None]).masked_fill(~real, 0.0)
    variance = (apart.square().sum(-1) / (count - 1).clamp(min=1)).flatten(1)  # B HG
    least, most = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
    return ((variance - least) / (most - least + 1e-6)).mean(1).nan_to_num(1.0)
