"""MiniCache: adjacent layers share directions, lengths and outliers stay their own (arXiv:2405.14366)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kvfold.methods.base import Method, method
from kvfold.options import check_int, check_number
from kvfold.views import CacheView
from kvfold.views.decisions import Pair, Share, Shared

EDGE = 1 - 1e-6
"""Cosines beyond it are those of the same, or of opposite, directions."""
BLOCK = 4096
"""Tokens of a head that are compared at once, in float32."""


@method(
    "minicache", title="MiniCache: shared depth", paper="2405.14366", kind="merge",
    formula=r"""
        \Omega_t = \arccos \cos(x^{l-1}_t, x^l_t), \quad d_t = \frac{1}{H} \sum_h \frac{\Omega_{h,t}}{\pi}
        e_t = \frac{\sin((1-\tau)\Omega_t)}{\sin \Omega_t} \frac{x^{l-1}_t}{\lVert x^{l-1}_t \rVert}
            + \frac{\sin(\tau\Omega_t)}{\sin \Omega_t} \frac{x^l_t}{\lVert x^l_t \rVert},
            \quad \hat x^j_t = \lVert x^j_t \rVert \, e_t, \; j \in \{l-1, l\}
        K = \{t : d_t \ge d_{\max} - \gamma (d_{\max} - d_{\min})\} \text{ for keys or for values stay whole}
    """,
    options={
        "start": "first layer that shares: a fraction of the layers on pages, or a number among them (S)",
        "t": "weight of the deeper layer's direction (tau)",
        "gamma": "part of the range of distances, from the top, whose tokens stay whole (gamma)",
        "residual": "generated tokens that are gathered before they are merged",
    },
)  # fmt: skip
@dataclass(frozen=True)
class MiniCache(Method):
    """From the middle of the model on, pairs of layers hold one direction for each key and each value (SLERP).

    No token is dropped, and there is no budget. The prompt is attended exactly and merged when its pass is over (with
    `prefill_chunk` after each chunk). Only tokens that both layers hold are merged, so it goes behind any method that
    evicts; what one layer drops or rewrites later no longer shares memory with the other, until the next merge. Methods
    that read a prompt twice before they decide (kvzip, speckv, kvfold with `quality="best"`) can't be composed with it.
    Differs from the paper: the printed retention rule selects the outliers only if d is a similarity; it is mirrored
    here. d is a mean over the KV heads that hold a token, and retention is of whole tokens: an outlier in keys or in
    values stays as it is in both layers (reconstructed). Generated tokens go by the range of the prompts, which
    further ones widen (reconstructed), `residual` at a time, so that most steps cost nothing. Where keys or values
    point in opposite directions the token is retained. Directions are not quantised yet.
    It rests on adjacent layers that point alike, head by head. Those of the bundled models stand at right angles (d is
    0.5 on average): there the answers are lost with the defaults.
    """

    start: int | float = 0.5
    t: float = 0.6
    gamma: float = 0.05
    residual: int = 16

    shares_layers = True

    def __post_init__(self) -> None:
        if isinstance(self.start, float):
            check_number("start", self.start, 0.0, 1.0)
        else:
            check_int("start", self.start, 0)
        check_number("t", self.t, 0.0, 1.0)
        check_number("gamma", self.gamma, 0.0, 1.0)
        check_int("residual", self.residual, 1)

    def first(self, layers: int) -> int:
        """The place of the first layer that shares, of so many."""
        return int(self.start * layers + 1e-9) if isinstance(self.start, float) else self.start

    def after_forward(self, cache: CacheView) -> Mapping[int, Share]:
        uppers = range(self.first(len(cache)) + 1, len(cache), 2)
        return {upper: Share(upper - 1, self.residual, self.choose) for upper in uppers}

    def choose(self, pair: Pair) -> Shared:
        """Merge all tokens but the outliers. The state is the range of distances: of keys, then of values."""
        retained = torch.zeros_like(pair.valid)
        directions: list[Tensor] = []
        ranges: list[Tensor] = []
        for i, (x, y) in enumerate(((pair.lower.keys, pair.upper.keys), (pair.lower.values, pair.upper.values))):
            d = self.over_heads(pair, distance(x, y))
            known = None if pair.state is None else pair.state[:, 2 * i : 2 * i + 2]
            low, high = widened(known, d, pair)
            retained |= outliers(d, low, high, self.gamma)
            ranges += [low, high]
            directions.append(slerp(x, y, self.t))
        return Shared(pair.valid & ~retained, directions[0], directions[1], torch.stack(ranges, 1))

    @staticmethod
    def over_heads(pair: Pair, d: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T"]:
        """The mean distance of a token over the heads that hold it."""
        size = int(pair.lower.positions.max()) + 1
        at = pair.lower.positions.long().masked_fill(~pair.valid, size)  # what is no token goes behind the last
        sums = torch.zeros(len(d), size + 1, device=d.device, dtype=torch.float32)
        total = sums.scatter_add(1, at.flatten(1), d.masked_fill(~pair.valid, 0.0).flatten(1))
        count = sums.scatter_add(1, at.flatten(1), pair.valid.float().flatten(1))
        return (total / count.clamp(min=1)).gather(1, at.flatten(1)).view_as(d)


def distance(x: Float[Tensor, "B H T D"], y: Float[Tensor, "B H T D"]) -> Float[Tensor, "B H T"]:
    """The angle between two layers' vectors over pi; infinite where they point in opposite directions."""
    found = []
    for a, b in zip(torch.split(x, BLOCK, 2), torch.split(y, BLOCK, 2), strict=True):
        cosine = F.cosine_similarity(a.float(), b.float(), dim=-1)
        angle = cosine.clamp(-EDGE, EDGE).arccos() / math.pi
        found.append(angle.masked_fill(cosine <= -EDGE, torch.inf))
    return torch.cat(found, 2)


def slerp(x: Float[Tensor, "B H T D"], y: Float[Tensor, "B H T D"], t: float) -> Float[Tensor, "B H T D"]:
    """Unit vectors between the directions of x (t = 0) and y (t = 1), in their dtype; worked out in float32.

    The division by sin(Omega) goes into normalising, so that nearly parallel vectors need no case of their own.
    """
    found = []
    for a, b in zip(torch.split(x, BLOCK, 2), torch.split(y, BLOCK, 2), strict=True):
        a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
        angle = (a * b).sum(-1, keepdim=True).clamp(-EDGE, EDGE).arccos()
        mixed = torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b
        found.append(F.normalize(mixed, dim=-1).to(x.dtype))
    return torch.cat(found, 2)


def widened(
    known: Float[Tensor, "B 2"] | None, d: Float[Tensor, "B H T"], pair: Pair
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """The least and the greatest distance of each row's prompts; of all tokens there are, where no prompt told."""
    none = d.new_full((len(d),), torch.inf)
    none = torch.stack([none, -none], 1)
    known = none if known is None else torch.where(known.isnan(), none, known)
    told = pair.prompt | (known[:, :1, None] > known[:, 1:, None])
    counts = pair.valid & told & d.isfinite()
    low = torch.minimum(known[:, 0], d.masked_fill(~counts, torch.inf).amin((1, 2)))
    high = torch.maximum(known[:, 1], d.masked_fill(~counts, -torch.inf).amax((1, 2)))
    return low, high


def outliers(d: Float[Tensor, "B H T"], low: Float[Tensor, " B"], high: Float[Tensor, " B"], gamma: float) -> Tensor:
    """Which distances are no further from the highest than `gamma` of the range."""
    low, high = low[:, None, None], high[:, None, None]
    return d.isinf() | (high - d <= gamma * (high - low))
