"""KeepKV: merge so that the answer to the current query does not change (arXiv:2504.09936)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.formats import LOG_MASS
from kvfold.merges import absorb, at_home, log_mass, log_over_set, nearest, over_set
from kvfold.methods._merging import Merging
from kvfold.methods.base import method
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores.exponents import log_exponents
from kvfold.views import LayerView
from kvfold.views.decisions import Decision, Keep

SCORE = "keepkv_log_score"


@method(
    "keepkv", title="KeepKV", paper="2504.09936", kind="merge",
    formula=r"""
        o = \frac{\sum_i p_i s_i v_i}{\sum_i p_i s_i}, \quad s_i = \exp(q^\top k_i / \sqrt D)
        p_r = p_e + p_c, \quad v_r = \frac{w_e v_e + w_c v_c}{w_e + w_c}, \quad w_i = p_i \hat s_i
        k_r = \frac{w_e k_e + w_c k_c}{w_e \ln \hat s_e + w_c \ln \hat s_c} \ln \frac{w_e + w_c}{p_r}
    """,
    options={
        "mode": 'how a slot keeps its mass: "zip" scales its key, "bias" its logit (ours), "votes" only counts',
        "similar": "cosine above which a dropped token is merged, not lost",
        "window": "queries at the prompt's end from which scores are estimated",
        "alpha": "what an estimate keeps of itself at each further query",
        "stretch": 'largest factor by which "zip" scales a key; beyond it the slot gets a bias',
    },
)  # fmt: skip
@dataclass(frozen=True)
class KeepKV(Merging):
    """What `score` drops folds into the likest kept token, whose votes (`log_mass`) and key make up for both.

    With exact scores (`alpha` 0) the answer to the query in hand stays as it is, and equal tokens merge without any
    loss at all. Scores before normalisation live in a column as logarithms, a mean over past queries, the newer the
    heavier: tokens that were scored by the same queries keep the same promise.
    "zip" where it can: its denominator may pass zero, and then, or past `stretch`, the slot takes the mean key and a
    bias ln(w_e + w_c) - ln s_r instead, which keeps the same mass (ours, as is "bias" everywhere). "votes" is what the
    official code does.
    Differs from the paper: the query heads of a group share the mean of their scores, so the answer of none of them is
    kept exactly, unless they agree. PyramidInfer's selection is any method here. `alpha` and `window` are not given
    (reconstructed), nor is how the prompt is merged before it is cut, which this does not do. An estimate is corrected
    by how many queries saw its token, not by how many there were (reconstructed), so that a young token's is no
    smaller. Their periodic mode, which builds the cache anew from a full one kept elsewhere, is not there; layers have
    the budgets of `score`, not PyramidInfer's.
    """

    mode: str = "zip"
    similar: float = 0.8
    window: int = 32
    alpha: float = 0.9
    stretch: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, ("zip", "votes", "bias"))
        check_number("similar", self.similar, -1.0)
        check_int("window", self.window, 1)
        check_number("alpha", self.alpha, 0.0, 0.999999)
        check_number("stretch", self.stretch, 1.0)

    def merged(self, view: LayerView, keep: Keep) -> list[Decision]:
        score, votes = self.estimate(view), log_mass(view)  # ln s, ln p
        home, cosine = nearest(view.valid & ~keep.mask, keep.mask, view.keys)
        home = torch.where(cosine > self.similar, home, at_home(home))
        weight = votes + score  # ln w
        total, together = log_over_set(weight, home), log_over_set(votes, home)
        share = (weight - total).exp()
        of_mean = over_set(share * score, home)  # ln s of the mean key, as the logit is linear in the key
        wanted = total - together  # ln s that lets as many votes weigh what the set weighs
        factor = torch.ones_like(share)
        if self.mode == "zip":
            factor = wanted / of_mean
            fits = (factor >= 1 / self.stretch) & (factor <= self.stretch)  # not where 0 / 0
            factor = torch.where(fits, factor, 1.0)
            together = torch.where(fits, together, total - of_mean)
        elif self.mode == "bias":
            together = total - of_mean
        score_of = wanted if self.mode == "votes" else total - together
        takes = keep.mask & (over_set(torch.ones_like(share), home) > 1)
        columns = {SCORE: torch.where(takes, score_of, score), LOG_MASS: torch.where(takes, together, votes)}
        return [absorb(view, home, share * factor, share), Keep(keep.mask, {**keep.columns, **columns})]

    def estimate(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """Log of each token's score: a mean over the queries that saw it, each `alpha` times as heavy as the next."""
        found, asked = log_exponents(view, self.window, self.alpha)
        if SCORE not in view.columns:
            return found
        age = (view.place.seen.to(asked.device)[:, None, None] - view.positions).clamp(min=1)
        age = torch.maximum(age, asked)
        rate = math.log(self.alpha) if self.alpha else -math.inf
        part = torch.expm1(rate * asked.clamp(min=1).float()) / torch.expm1(rate * age.float())  # 1 - alpha^n
        part = torch.where(view.earlier, part, 1.0)
        mean = torch.logaddexp(view.columns[SCORE] + torch.log1p(-part), found + part.log())
        return torch.where(asked > 0, mean, view.columns[SCORE]).masked_fill(~view.valid, 0.0)
