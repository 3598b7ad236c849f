"""ZipCache: salient tokens in 4 bits, the others in 2, by what some queries look at (arXiv:2405.14256)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kvfold.formats import WEIGHTS, Separable
from kvfold.methods.base import Method, method
from kvfold.ops.codes.packing import BITS
from kvfold.options import check_choice, check_int, check_number
from kvfold.scores import keep_top
from kvfold.views import LayerView, Queries
from kvfold.views.decisions import Decision, Keep, Store

LAYER = 1337
"""How far the seeds of two layers that follow each other are apart."""
BLOCK = 64
"""Probes whose attention is held at once."""
SHARE = 1e-9
"""What a product of a share and a count may be short of a whole number."""


@method(
    "zipcache", title="ZipCache: salient tokens in 4 bits, the others in 2", paper="2405.14256", kind="quantize",
    formula=r"""
        \tilde p_{h,t} = \frac{1}{|\{i \in P : i \ge t\}|} \sum_{g} \sum_{i \in P} A_{h,g,i,t}
        S_h = \mathrm{top}_{n - \lfloor (1 - r) n \rfloor}(\tilde p_h)
        \hat k = \mathrm{Q}^{\mathrm{channel}}(k), \quad
            \hat v = w \odot \mathrm{Q}^{\mathrm{token}}(v \oslash w), \quad w_c = \sqrt{\max_t |v_{t,c}|}
    """,
    options={
        "ratio": "share of the tokens that are salient (r)",
        "high": "bits of a number of a salient token: 2, 3, 4 or 8",
        "low": "bits of a number of any other: 2, 3, 4 or 8",
        "probes": "share of the queries, the last ones, that are probes (P); as many are drawn from the others",
        "counts": 'what attention is divided by: "probes", how many of them see the token; "code", how many queries do',
        "gap": "generated tokens that are held as they are, until they are coded together",
        "group": "tokens of a page, whose keys share a scale for each channel",
        "seed": "of the probes",
    },
)  # fmt: skip
@dataclass(frozen=True)
class ZipCache(Method):
    """Keeps every token: in each KV head the salient ones in `high` bits, the others in `low` bits.

    Acts at the end of a prompt on what it brought, and on generated tokens as soon as there are `gap` of them: those
    are ranked by the attention of the last one alone, as in the code. Nothing is coded twice. Of each of both kinds
    fewer than `group` tokens wait, as they are, for a page to be full.
    Probes are the last queries and as many of the others, drawn with replacement, in each layer anew and in each row
    alike; one that is drawn twice counts twice. `counts="code"` divides by the number of all queries that see a token,
    as the code does, which ranks recent and early tokens by two measures.
    Differs from the paper: it codes the whole cache anew at each `gap`; here keys have a scale and a zero for each
    channel of a page of `group` tokens of one kind, and a page is final. Values have theirs for each token of a KV head
    (the paper: of all heads), and the channels' weights are those of a row's first prompt (its first chunk).
    A token that is dropped would leave a page: behind methods that drop at the end of a prompt it works, before or
    behind others it does not.
    """

    ratio: float = 0.6
    high: int = 4
    low: int = 2
    probes: float = 0.05
    counts: str = "probes"
    gap: int = 100
    group: int = 64
    seed: int = 0

    stores = True

    def __post_init__(self) -> None:
        check_number("ratio", self.ratio, 0.0, 1.0)
        check_number("probes", self.probes, 0.0, 0.5)
        check_choice("counts", self.counts, ("probes", "code"))
        check_int("gap", self.gap, 1)
        check_int("seed", self.seed, 0)
        for name, bits in (("high", self.high), ("low", self.low)):
            check_int(name, bits, min(BITS), high=max(BITS))
            check_choice(name, bits, BITS)
        if self.high == self.low:
            raise ValueError(f"high={self.high} must differ from low={self.low}: kivi has one width for all tokens")
        self.forms  # noqa: B018  (raises for options that can't be)

    @cached_property
    def forms(self) -> tuple[Separable, Separable]:
        """What salient tokens and the others are held in."""
        return Separable(self.high, self.group), Separable(self.low, self.group)

    @property
    def own_steps(self) -> bool:
        return True

    @property
    def firm(self) -> tuple[Separable, Separable]:  # type: ignore[override]
        """Both: a page stays whole."""
        return self.forms

    def after_prefill(self, view: LayerView) -> Sequence[Decision]:
        own = self.own(view)
        return self._coded(own, self.saliency(view), own.valid, {WEIGHTS: channel_weights(own)})

    def after_decode(self, view: LayerView) -> Sequence[Decision]:
        own = self.own(view)
        due = own.valid & (own.count >= self.gap)[..., None]
        if not bool(due.any()):
            return ()
        return self._coded(own, view.attention(1).sum((2, 3)), due, {})

    def _coded(
        self, own: LayerView, scores: Float[Tensor, "B H T"], due: Bool[Tensor, "B H T"], told: dict[str, Tensor]
    ) -> Sequence[Decision]:
        some = own.apply(Keep(due))
        others = (some.count.double() * (1 - self.ratio) + SHARE).floor().long()
        salient = keep_top(some, scores, some.count - others).mask
        high, low = self.forms
        return Store(high, salient & due, told), Store(low, due & ~salient, told)

    def own(self, view: LayerView) -> LayerView:
        """The tokens that are not coded yet: not in pages, and not waiting for one."""
        coded = torch.zeros_like(view.valid)
        for number, form in enumerate(view.held):
            if form in self.forms:
                coded |= view.home == number
        return view.apply(Keep(view.valid & ~coded))

    def saliency(self, view: LayerView) -> Float[Tensor, "B H T"]:
        """The attention of the probes, over the number of those that see a token."""
        probes = self.probed(view.queries, view.place.layer)
        sums = torch.zeros(view.valid.shape, dtype=torch.float32, device=view.valid.device)
        seen = torch.zeros_like(sums)
        for block in torch.split(torch.arange(probes.valid.shape[1], device=sums.device), BLOCK):
            some = probes.pick(block)
            sums += view.attention_of(some).sum((2, 3))
            asked_at = some.positions.masked_fill(~some.valid, -1)[:, None, :, None]
            seen += (asked_at >= view.positions[:, :, None]).sum(2)
        if self.counts == "code":
            seen = (view.place.seen.to(sums.device)[:, None, None] - view.positions).float()
        return sums / seen.clamp(min=1)

    def probed(self, queries: Queries, layer: int) -> Queries:
        """The probes of each row, those that were drawn behind the others; padding where a row has fewer."""
        counts = queries.valid.sum(1).tolist()
        recent, drawn = (
            [math.ceil(self.probes * n - SHARE) for n in counts],
            [int(self.probes * n + SHARE) for n in counts],
        )
        recent = [max(1, number) for number in recent]
        width = max(map(sum, zip(recent, drawn, strict=True)), default=0)
        random = torch.Generator().manual_seed(self.seed + LAYER * layer)
        places = torch.rand(max(drawn, default=0), generator=random, dtype=torch.float64)
        which = torch.zeros(len(counts), width, dtype=torch.int64)
        valid = torch.zeros(len(counts), width, dtype=torch.bool)
        pad = queries.valid.shape[1]
        for row, (n, last, number) in enumerate(zip(counts, recent, drawn, strict=True)):
            earlier = (places[:number] * (n - last)).long() if n > last else places[:0].long()
            mine = torch.cat([torch.arange(max(0, n - last), n), earlier])
            which[row, : len(mine)], valid[row, : len(mine)] = mine, True
        slots = torch.argsort(queries.valid.byte(), dim=1, stable=True)  # padding in front
        front = (pad - torch.tensor(counts, dtype=torch.int64))[:, None]
        at = slots.gather(1, (which + front).clamp(max=pad - 1).to(slots.device))
        return _picked(queries, at, valid.to(slots.device))


def _picked(queries: Queries, at: Int[Tensor, "B W"], valid: Bool[Tensor, "B W"]) -> Queries:
    """Other queries in each row."""
    states = queries.states.gather(
        2, at[:, None, :, None].expand(-1, queries.states.shape[1], -1, queries.states.shape[3])
    )
    lse = queries.lse.gather(2, at[:, None].expand(-1, queries.lse.shape[1], -1))
    return Queries(states, valid, lse, queries.positions.gather(1, at), plain=queries.plain)


def channel_weights(view: LayerView) -> Float[Tensor, "B H D"]:
    """The root of each channel's largest value; 1 where all are zero."""
    most = view.values.float().abs().masked_fill(~view.valid[..., None], 0.0).amax(2)
    return most.sqrt().masked_fill((most == 0) | ~most.isfinite(), 1.0)
