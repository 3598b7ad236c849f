"""LOOK-M: text stays, images go first, and what goes joins what stays (arXiv:2406.18139)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget, is_all
from kvfold.merges import absorb, at_home, counted, nearest, over_set
from kvfold.methods._elastic import MASSES
from kvfold.methods.base import Method, method
from kvfold.methods.scored import recent
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top
from kvfold.views import IMAGE, LayerView
from kvfold.views.decisions import Decision, Keep

SCORE = "look_m_score"


@method(
    "look-m", title="LOOK-M", paper="2406.18139", kind="merge",
    formula=r"""
        s_{h,t} = \sum_{g,i} A_{h,g,i,t}, \quad
            K_h = \mathrm{recent}_{\lfloor rb \rfloor} \cup \mathrm{top}_{b-\lfloor rb \rfloor}
            \big([t \in \mathrm{text}], s_{h,t}\big)
        c(e) = \arg\max_{c \in K_h} \cos(k_e, k_c), \quad E_c = \lbrace e : c(e) = c \rbrace, \quad n = |E_c|
        k_c \leftarrow \frac{1}{n+1}\Big(k_c + \sum_{e \in E_c} \frac{k_e + k_c}{2}\Big)
            \quad \text{(pivot; values alike)}
    """,
    options={
        "recent": "share of the budget for the most recent tokens (r)",
        "merge": (
            '"pivot": each that goes is first averaged with the one that takes it; "average": the mean of all; '
            '"weighted": those at least as similar as most, by their cosine'
        ),
        "text_prior": "whether text stays before images; False: the most attended of both",
        "sinks": "first tokens that always stay without the text prior",
        "overrun": "whether all text stays where it alone is more than the budget, as in the paper",
        "mass": 'what tells a query how many tokens a slot stands for: "convex" (nothing) or "counted" (ours)',
    },
)  # fmt: skip
@dataclass(frozen=True)
class LookM(Method):
    """Recent tokens, then text, then the images' tokens with the most attention; the others merge by key similarity.

    Acts at the end of a prompt with images, in each row by itself; a text without any stays as it is, whatever its
    length. Generated tokens are appended. On a further turn the attention of all queries adds up, and what is left of
    earlier images competes with new ones. Which tokens are images is taken from the prompt's ids.
    Differs from the paper: it keeps all text and overruns the budget where there is more (`overrun=True`); here the
    least attended text then goes and is merged, too. Text is put first by rank, not by a constant that swallows
    half-precision scores. "average" merges all that goes (the code puts sums on wrong slots); "weighted" takes what
    is at least as similar as the mean of those that go in its own head (the code: of all heads at once). Query heads
    of a group add up. `sinks` without the text prior are as in the code.
    """

    budget: Budget = 0.2
    recent: float = 0.5
    merge: str = "pivot"
    text_prior: bool = True
    sinks: int = 4
    overrun: bool = False
    mass: str = "convex"

    asks = frozenset({"column_sums", "images"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_number("recent", self.recent, 0.0, 1.0)
        check_choice("merge", self.merge, ("pivot", "average", "weighted"))
        check_choice("text_prior", self.text_prior, (True, False))
        check_int("sinks", self.sinks, 0)
        check_choice("overrun", self.overrun, (True, False))
        check_choice("mass", self.mass, MASSES)

    def after_prefill(self, view: LayerView) -> list[Decision] | None:
        images = view.images
        before = view.columns.get(SCORE, torch.zeros(view.valid.shape, device=view.valid.device, dtype=torch.float32))
        looked = (images | (view.valid & (before > 0))).flatten(1).any(1)[:, None]  # rows with images, now or earlier
        if is_all(self.budget) or not looked.any():
            return None
        scores = torch.where(looked[..., None], view.column_sums() + before, 0.0)
        keep = self.selected(view, scores, view.valid & ~images, looked)
        home, weight = self.weighed(*nearest(view.valid & ~keep.mask, keep.mask, view.keys))
        columns = {SCORE: scores, IMAGE: images.float()}
        if self.mass == "counted":
            columns |= counted(view, home)
        return [absorb(view, home, weight), Keep(keep.mask, columns)]

    def selected(
        self,
        view: LayerView,
        scores: Float[Tensor, "B H T"],
        text: Bool[Tensor, "B H T"],
        looked: Bool[Tensor, "B 1"],
    ) -> Keep:
        """Who stays; everyone in the rows where there was never an image."""
        counts = view.budget(self.budget)
        newest = (counts * self.recent).floor().long()
        always = recent(view, newest)
        if not self.text_prior:
            always = always | (view.valid & (view.rank < (counts - newest).clamp(max=self.sinks)[..., None]))
        else:
            scores = text_first(view, scores, text)
            if self.overrun:
                counts = newest + torch.maximum((text & ~always).sum(-1), counts - newest)
        return keep_top(view, scores, torch.where(looked, counts, view.count), always)

    def weighed(
        self, home: Int[Tensor, "B H T"], cosine: Float[Tensor, "B H T"]
    ) -> tuple[Int[Tensor, "B H T"], Float[Tensor, "B H T"]]:
        """Where each token goes in the end, and what it weighs there."""
        goes = home != at_home(home)
        if self.merge == "weighted":
            mean = torch.where(goes, cosine, 0.0).sum(-1) / goes.sum(-1).clamp(min=1)
            home = torch.where(goes & (cosine < mean[..., None]), at_home(home), home)
            goes = home != at_home(home)
        members = over_set(torch.ones_like(cosine), home)  # n + 1
        if self.merge == "pivot":
            return home, torch.where(goes, 0.5, (members + 1) / 2) / members
        return home, (torch.where(goes, cosine, 1.0) if self.merge == "weighted" else 1.0) / members


def text_first(view: LayerView, scores: Float[Tensor, "B H T"], text: Bool[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
    """Scores that rank all text before all images, and each of the two as `scores` does; exact, as they are ranks."""
    order = torch.argsort(scores.masked_fill(~view.valid, -torch.inf), dim=-1, descending=True, stable=True)
    size = order.shape[-1]
    behind = torch.arange(size, 0, -1, device=order.device, dtype=torch.float32).expand_as(scores)
    return torch.empty_like(scores).scatter_(-1, order, behind) + size * text
