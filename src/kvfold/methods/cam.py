"""CaM: a token that leaves spreads its value over the next ones (Zhang et al., ICML 2024, PMLR 235:58840)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.merges import few, take
from kvfold.methods._merging import Merging
from kvfold.methods.base import Decisions, method
from kvfold.options import check_choice, check_int
from kvfold.scores.noise import hashed
from kvfold.views import LayerView
from kvfold.views.decisions import Amend, Decision, Keep

SCORE = "cam_attention"


@method(
    "cam", title="CaM: Cache Merging", kind="merge",
    formula=r"""
        p = \mathrm{clamp}\Big(\frac{\bar A_i}{\mathrm{mean}_{j=i+1}^{i+m} \bar A_j}, 0, 1\Big),
            \quad M \sim \mathrm{Bernoulli}(p)
        v_j \leftarrow v_j + \frac{M}{m} v_i, \quad j = i+1 \dots i+m
    """,
    options={
        "targets": "kept tokens after it over which a dropped one's value is spread (m)",
        "draw": 'whether it is: "sampled", or always by the "expected" part p',
        "seed": "of the draws",
    },
)  # fmt: skip
@dataclass(frozen=True)
class CaM(Merging):
    """While decoding, the value of what `score` drops is added, in equal parts, to the next `targets` kept tokens.

    With a probability that makes up for what it would have been given: its attention over the mean of theirs, both
    summed over the generated tokens' queries. Keys stay as they are, and the prompt is cut without merging, as by the
    method that selects alone. Draws come from `seed`, layer, head and the token's place in the text.
    Differs from the paper: the three official codes differ from it and from one another; probabilities are the
    paper's. Query heads of a group share the mean of their attention. With H2O as `score` it is reconstructed (no
    public code). Several tokens that leave at once all merge, as if one after another had looked at the same kept ones.
    """

    score: str = "streamingllm"
    targets: int = 32
    draw: str = "sampled"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("targets", self.targets, 1)
        check_choice("draw", self.draw, ("sampled", "expected"))
        check_int("seed", self.seed, 0, high=2**63 - 1)

    @property
    def asks(self) -> frozenset[str]:  # type: ignore[override]
        """What the inner method asks for, and each step's attention."""
        return super().asks | {"attention"}

    def after_prefill(self, view: LayerView) -> Decisions:
        return self.selected(view, "after_prefill")

    def merged(self, view: LayerView, keep: Keep) -> list[Decision]:
        got = view.attention(1)[:, :, :, 0].mean(2).masked_fill(~view.valid, 0.0)
        got = got + view.columns[SCORE] if SCORE in view.columns else got
        kept = view.valid & keep.mask
        return [self.spread(view, kept, got), Keep(keep.mask, {**keep.columns, SCORE: got})]

    def spread(self, view: LayerView, kept: Bool[Tensor, "B H T"], got: Float[Tensor, "B H T"]) -> Amend:
        """The values of the targets of all tokens that leave."""
        leaving, leaves = few(view.valid & ~kept)  # B H N
        ranks = kept.cumsum(-1)  # B H T
        wanted = ranks.gather(-1, leaving)[..., None] + torch.arange(
            1, min(self.targets, kept.shape[-1]) + 1, device=kept.device
        )
        there = leaves[..., None] & (wanted <= ranks[..., -1:, None])  # B H N M
        slots = torch.searchsorted(ranks, wanted.flatten(2)).clamp(max=kept.shape[-1] - 1)
        many = there.sum(-1).clamp(min=1)
        mean = got.gather(-1, slots).view(there.shape).masked_fill(~there, 0.0).sum(-1) / many
        chance = (got.gather(-1, leaving) / mean).nan_to_num(0.0, posinf=1.0).clamp(0, 1)
        if self.draw == "sampled":
            heads = torch.arange(view.heads, device=kept.device)[:, None]
            bits = hashed(view.positions.gather(-1, leaving), self.seed, view.place.layer, heads)
            chance = (((bits >> 8) & 0xFFFFFF).float() * 2.0**-24 < chance).float()
        part = (chance / many)[..., None] * there
        # Tokens that leave at once may have targets in common, which are written once.
        written = (
            torch.zeros(kept.shape, device=kept.device, dtype=torch.float32).scatter_add_(2, slots, part.flatten(2)) > 0
        )
        touched, here = few(written)
        if not touched.shape[-1]:
            return Amend(touched)
        near = (written.cumsum(-1) - 1).clamp(min=0).gather(-1, slots)
        given = take(view.values, leaving).float()[:, :, :, None] * part[..., None]
        given = given.masked_fill(~there[..., None], 0.0).flatten(2, 3)
        values = take(view.values, touched).float().scatter_add_(2, near[..., None].expand_as(given), given)
        return Amend(torch.where(here, touched, -1), None, values.to(view.values.dtype))
