"""KVMerger: runs of neighbouring tokens with similar keys become one (arXiv:2407.08454)."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.budgets import Budget, check_budget
from kvfold.budgets.allocate import exempt_layers
from kvfold.formats import LOG_MASS, Chunk
from kvfold.merges import FRAMES, UNSEEN, chain_links, fold_sets, log_mass, rope_for, sets_of
from kvfold.merges.chain import neighbour_cosine
from kvfold.methods.base import Method, method
from kvfold.options import check_choice, check_ints, check_number
from kvfold.scores import top_mask
from kvfold.scores.reach import reach
from kvfold.views import LayerView
from kvfold.views.decisions import Keep, Rewrite

SHARES = ((0.0, 0.2, 0.35, 0.5, 1.0), (0.0, 0.068, 0.08, 0.17, 0.34), (0.0, 0.048, 0.02, 0.12, 0.24))
"""Budget, recent share, heavy share, straight lines between: the paper's at 35 % and 50 %; below 35 % ours, the same
parts of the budget as at 50 % (reconstructed: the paper goes no lower)."""


@method(
    "kvmerger", title="KVMerger: adaptive KV cache merging", paper="2407.08454", kind="merge",
    formula=r"""
        \cos(k_t, k_{t+1}) \ge \epsilon \Rightarrow t, t+1 \in S
        g_t = \exp\Big(-\frac{\lVert k_p - k_t \rVert^2}{2\sigma^2}\Big),
            \quad p = \arg\max_{t \in S} \sum_i A_{i,t},
            \quad \sigma = \frac{1}{\sqrt{2}|S|}\sum_{t \in S} \lVert k_p - k_t \rVert
        \tilde k_S = \frac{\sum_{t \in S} g_t k_t}{\sum_{t \in S} g_t},
            \quad \tilde v_S = \frac{\sum_{t \in S} g_t v_t}{\sum_{t \in S} g_t},
            \quad \mathrm{logit}_S = \frac{q^\top \tilde k_S}{\sqrt D} + \ln |S|
    """,
    options={
        "threshold": (
            "least cosine of a link that is taken whatever the budget; None: as many links as the "
            "budget needs"
        ),
        "recent": "share of the prompt at its end that stays bit for bit; None: as the paper sets it for the budget",
        "heavy": "share of the prompt with the most attention that stays bit for bit; None: as the paper sets it",
        "bandwidth": 'sigma of the Gaussian weights: "mean_distance", "literal" as printed, or a number',
        "mass": (
            'what tells a query how much a slot stands for: "counted" (ours), "attended" (ours: by the mean attention '
            'that its tokens got, which weighs their values, too), "paper" or "convex" (nothing)'
        ),
        "frame": 'keys are compared and folded as they are ("rotated"), or as they were before RoPE ("unrotated")',
        "heads": 'links compete in each head ("even"), or over a layer\'s heads with a fifth safe ("adaptive")',
        "evict": "share of what must go that is dropped, the least attended tokens, before runs are folded",
        "skip": "layers that are left whole as long as the budget allows; -1 is the last",
    },
)  # fmt: skip
@dataclass(frozen=True)
class KVMerger(Method):
    """Runs of tokens whose neighbouring keys point the same way fold into their most attended member.

    Protected, bit for bit: the last `recent` and the most attended `heavy` shares of the prompt (None: as the paper
    sets them for this budget, reconstructed in between). Of the links between free neighbours, as many of the most
    similar are taken as the budget asks for, in each head: the paper's scan with its threshold searched. With a
    `threshold` (the paper: 0.75) all links above it are taken, and more only where the budget asks for more. Acts
    at the end of a prompt; generated tokens are appended. On a further turn only the new queries say what is
    important, runs do not cross from what was stored into what is new, and merged tokens merge again by their mass
    ("paper" and "convex" keep none: there a merged token counts as one).
    `mass`: "counted" adds the log of a slot's token count to its logits (ours), "paper" multiplies its value,
    "convex" does neither. `frame`, `heads`, `evict` and `mass="attended"` are ours, to see what each is good for.
    Differs from the paper: no public code. `bandwidth="mean_distance"` is how its sigma must be meant
    (reconstructed); "literal" is as printed. Neighbours are tokens side by side in what is left of the text: after an
    evicting stage runs can span gaps. `skip` layers count towards the budget, and keep all as long as the
    others keep three quarters of an even share. Query heads of a group add up their attention.
    """

    budget: Budget = 0.35
    threshold: float | None = None
    recent: float | None = None
    heavy: float | None = None
    bandwidth: str | float = "mean_distance"
    mass: str = "counted"
    skip: tuple[int, ...] = (0, 1, -1)
    frame: str = "rotated"
    heads: str = "even"
    evict: float = 0.0

    asks = frozenset({"column_sums"})

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_choice("mass", self.mass, ("counted", "attended", "paper", "convex"))
        check_choice("frame", self.frame, FRAMES)
        check_choice("heads", self.heads, ("even", "adaptive"))
        check_number("evict", self.evict, 0.0, 1.0)
        for name, high in (("threshold", 1.0), ("recent", 1.0), ("heavy", 1.0)):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), -1.0 if name == "threshold" else 0.0, high)
        check_ints("skip", self.skip)
        if isinstance(self.bandwidth, str):
            check_choice("bandwidth", self.bandwidth, ("mean_distance", "literal"))
        else:
            check_number("bandwidth", self.bandwidth, 1e-6, 1e6)

    def after_prefill(self, view: LayerView) -> Rewrite | None:
        budget = view.budget(self.budget, lambda b: exempt_layers(view.place.ordinals(self.skip), view.place.layers, b))
        need = (view.count - budget).clamp(min=0)
        skipped = view.place.ordinal in view.place.ordinals(self.skip)
        threshold = None if skipped else self.threshold
        if threshold is None and not need.any():
            return None
        importance = view.column_sums()
        free = view.valid & ~self.protected(view, importance, budget)
        if self.evict:
            least = (-importance).masked_fill(~free, -torch.inf)
            gone = top_mask(least, torch.minimum((need * self.evict).long(), free.sum(-1)))
            view, need, free = view.apply(Keep(~gone)), need - gone.sum(-1), free & ~gone
        by_weight = self.mass == "attended"
        weight = (importance / reach(view).clamp(min=1.0)).clamp(min=UNSEEN) if by_weight else log_mass(view).exp()
        # Neighbours are tokens side by side in what is left of the text, whatever empty slots lie between them.
        rope, places = rope_for(view, self.frame), view.pack(view.positions)
        stored, values, importance, weight = map(view.pack, (view.keys, view.values, importance, weight))
        keys = stored if rope is None else rope.shift(stored.float(), -places)
        link = self.links(self._cosine(view, keys), view.pack(free), need, view.count - budget // 5, threshold)
        folded = fold_sets(keys, values, sets_of(link), importance, weight, bandwidth=self.bandwidth, by_mass=by_weight)
        keys, values, columns = folded.keys, folded.values, dict(view.columns)
        if rope is not None:  # a token alone stays bit for bit
            keys = torch.where((folded.weight == 1.0)[..., None], stored, rope.shift(keys, places).to(stored.dtype))
        if self.mass == "counted":
            columns[LOG_MASS] = view.unpack(folded.size.log())
        elif self.mass == "attended":
            columns[LOG_MASS] = log_mass(view) + view.unpack((folded.size / weight).log())
        elif self.mass == "paper":
            values = (values.float() * folded.size[..., None]).to(values.dtype)
        slots = view.valid & view.unpack(folded.pivot) & (budget > 0)[..., None]
        return Rewrite(Chunk(view.unpack(keys), view.unpack(values), slots, columns))

    def links(
        self,
        cosine: Float[Tensor, "B H T"],
        free: Bool[Tensor, "B H T"],
        need: Int[Tensor, "B H"],
        most: Int[Tensor, "B H"],
        threshold: float | None,
    ) -> Bool[Tensor, "B H T"]:
        """Which tokens join the next one: `need` links a head, or as many in all heads together, `most` in any."""
        if self.heads == "even":
            return chain_links(cosine, free, need, threshold)
        able = chain_links(cosine, free, torch.maximum(need, most))
        rivals = cosine.masked_fill(~able, -torch.inf).flatten(1)[:, None]
        link = top_mask(rivals, need.sum(1, keepdim=True)).view(able.shape)
        return link if threshold is None else link | chain_links(cosine, free, torch.zeros_like(need), threshold)

    @staticmethod
    def _cosine(view: LayerView, keys: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T"]:
        """Cosine of each packed key with the next; below any other where the next one came with a later turn.

        So turns only join where the budget leaves no other link: when it is a single token.
        """
        earlier = view.pack(view.earlier)
        return neighbour_cosine(keys).masked_fill(earlier & ~F.pad(earlier[..., 1:], (0, 1), value=True), -2.0)

    def protected(
        self, view: LayerView, importance: Float[Tensor, "B H T"], budget: Int[Tensor, "B H"]
    ) -> Bool[Tensor, "B H T"]:
        """The recent tokens and the heavy hitters, as many as leave the budget reachable."""
        shares = [self.shares(fraction) for fraction in view.fraction(self.budget)]
        wanted = torch.tensor(shares, dtype=torch.float64, device=budget.device)
        recent, heavy = (view.count * wanted.T[:, :, None]).long()
        # A run between two protected tokens keeps a slot; recent + heavy tokens make heavy + 1 runs at most, and
        # one more where a run ends because the turn does.
        runs = 1 + view.earlier.any(-1).long()
        recent = torch.minimum(recent, (budget - runs).clamp(min=0))
        heavy = torch.minimum(heavy, (budget - recent - runs).clamp(min=0) // 2)
        tail = view.valid & (view.rank >= (view.count - recent)[..., None])
        return tail | top_mask(importance.masked_fill(tail | ~view.valid, -torch.inf), heavy)

    def shares(self, fraction: float) -> tuple[float, float]:
        """Shares of the prompt that are protected as recent and as heavy, for a budget that is this fraction of it."""
        recent, heavy = (float(np.interp(fraction, SHARES[0], SHARES[i])) for i in (1, 2))
        return (recent if self.recent is None else self.recent, heavy if self.heavy is None else self.heavy)
