"""KVCrush: part of the budget goes to representatives of what would be evicted (arXiv:2503.00022)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.methods.base import method
from kvfold.methods.scored import Wrapper
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top, top_mask
from kvfold.scores.noise import hashed
from kvfold.views import LayerView
from kvfold.views.decisions import Keep

ANCHORS = ("random", "zeros", "ones", "alternating")


@method(
    "kvcrush", title="KVCrush", paper="2503.00022", kind="evict",
    formula=r"""
        x_{t,h} = [s_{h,t} \ge \mathrm{median}(s_h)]
        d_t = \sum_h |x_{t,h} - a_h|
        K_h = \mathrm{top}_{(1-\phi)b}(s_h) \cup \text{evenly}_{\phi b}(\text{the others in the order of } d)
    """,
    options={
        "share": "share of the budget, less what always stays, for representatives (phi)",
        "anchor": 'what behaviours are compared with (a): "random", "zeros", "ones" or "alternating"',
        "seed": "of random anchors",
    },
)  # fmt: skip
@dataclass(frozen=True)
class KVCrush(Wrapper):
    """The best tokens of another method, and of the rest some that the heads behave differently towards.

    A token's behaviour is a bit for each KV head: whether it is in the upper half of that head's scores. What a head
    would evict is sorted by Hamming distance to an `anchor`, and tokens at even steps of that order stay in its
    stead: the share `share` of what the budget leaves beside the tokens that the other method always keeps.
    "random" anchors come from `seed` and the layer.
    Differs from the paper: its details are reconstructed from two public codes, which group blocks of tokens; here
    the unit is a token (the paper's, reconstructed). The paper's mean anchor, the majority of all bits, is not there:
    as each head has ones for half of the tokens, rounded down, it would be "zeros". The default is that of the class
    in one of the codes. Both ends of the order are chosen. A head that has dropped a token has a zero for it.
    """

    share: float = 0.25
    anchor: str = "alternating"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("share", self.share, 0.0, 1.0)
        check_choice("anchor", self.anchor, ANCHORS)
        check_int("seed", self.seed, 0, high=2**63 - 1)

    def after_prefill(self, view: LayerView) -> Keep:
        scores = self.scores(view)
        counts = torch.minimum(self.counts(view, scores), view.count)
        always = self.always(view, counts)
        middle = view.valid if always is None else view.valid & ~always
        room = (counts - (view.count - middle.sum(-1))).clamp(min=0)
        wanted = (room * self.share).long()
        best = keep_top(view, scores, counts - wanted, always=always).mask
        standing = representatives(self.distance(view, scores, middle), middle & ~best, wanted)
        return Keep(best | standing, self.carried(view, scores))

    def distance(
        self, view: LayerView, scores: Float[Tensor, "B H T"], middle: Bool[Tensor, "B H T"]
    ) -> Int[Tensor, "B H T"]:
        """Hamming distance of each token's behaviour to the anchor.

        Heads may hold different tokens in the same slot: their bits meet at the tokens' places in the text.
        """
        upper = top_mask(scores.masked_fill(~middle, -torch.inf), middle.sum(-1) // 2)
        (b, h, _), places = view.valid.shape, int(view.place.seen.max()) + 1
        at = view.positions.long().masked_fill(~view.valid, places - 1)  # empty slots: behind the text
        bits = torch.zeros(b, h, places, dtype=torch.bool, device=upper.device).scatter_(2, at, upper)
        away = (bits != self.anchor_bits(h, view.place.layer).to(bits.device)).sum(1, keepdim=True)
        return away.expand(b, h, places).gather(2, at)

    def anchor_bits(self, number: int, layer: int) -> Bool[Tensor, "H 1"]:
        """The bit of each of `number` heads that tokens are compared with."""
        heads = torch.arange(number)[:, None]
        if self.anchor == "random":
            return hashed(heads, self.seed, layer) < 0
        return {"zeros": heads < 0, "ones": heads >= 0, "alternating": heads % 2 == 1}[self.anchor]


def representatives(
    distance: Int[Tensor, "B H T"], among: Bool[Tensor, "B H T"], count: Int[Tensor, "B H"]
) -> Bool[Tensor, "B H T"]:
    """`count` of the tokens `among`, evenly spaced from the nearest to the farthest; ties in their order."""
    t = distance.shape[-1]
    order = torch.argsort(distance.masked_fill(~among, torch.iinfo(distance.dtype).max), dim=-1, stable=True)
    many = among.sum(-1)
    count = torch.minimum(count, many)[..., None]
    last, steps = (many[..., None] - 1).clamp(min=0), (count - 1).clamp(min=1)
    i = torch.arange(t, device=distance.device)
    ranks = torch.where(i < count, (2 * i * last + steps) // (2 * steps), t)  # rounded; t: nobody
    chosen = torch.zeros(*among.shape[:2], t + 1, dtype=torch.bool, device=among.device)
    chosen = chosen.scatter_(-1, ranks, torch.ones_like(ranks, dtype=torch.bool))[..., :t]
    return torch.zeros_like(among).scatter_(-1, order, chosen)
