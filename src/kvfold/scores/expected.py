"""What keys can expect of queries that are still to come, if those are distributed like the ones that came."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import LOG_MASS
from kvfold.rotation import Rope
from kvfold.views import LayerView

BLOCK_TOKENS = 4096
"""Keys that meet the covariance at once."""
BLOCK_QUERIES = 1024
"""Queries that are turned at once."""
TURNS = "mean_rotation"


def future_queries(
    view: LayerView, future: int, skip: int
) -> tuple[Float[Tensor, "B H G D"], Float[Tensor, "B H G D D"]]:
    """Mean and covariance of the pass's queries from text position `skip` on, seen from the `future` next positions.

    Each query is turned to the text's end; then the mean rotation of the steps beyond it is applied to both moments.
    Without the model's RoPE nothing is turned.
    """
    (b, hq, n, d), rope = view.queries.states.shape, view.place.rope
    positions = view.queries.positions
    counted = view.queries.valid & (positions >= skip)  # B Q
    mean = torch.zeros(b, hq, 1, d, device=positions.device, dtype=torch.float32)
    spread, many = (
        torch.zeros(b, hq, d, d, device=positions.device, dtype=torch.float32),
        torch.zeros(b, 1, 1, 1, device=positions.device, dtype=torch.float32),
    )
    for start in range(0, n, BLOCK_QUERIES):
        here = slice(start, start + BLOCK_QUERIES)
        weight = counted[:, None, here, None].float()  # B 1 W 1
        q = view.queries.states[:, :, here].float().masked_fill(weight == 0, 0.0)
        if rope is not None:
            steps = view.place.seen.to(positions.device)[:, None] - positions[:, here]
            q = rope.shift(q, steps[:, None].expand(b, hq, -1))
        own = weight.sum(2, keepdim=True)
        centre = q.sum(2, keepdim=True) / own.clamp(min=1)
        q = (q - centre) * weight
        apart, part = centre - mean, own / (many + own).clamp(min=1)
        spread = spread + q.mT @ q + apart.mT @ apart * (many * part)  # around the mean of both
        mean, many = mean + apart * part, many + own
    mean, covariance = mean[:, :, 0], spread / many.clamp(min=1)
    if rope is not None:
        turns, key = view.place.step.setdefault(TURNS, {}), (rope, future, d, str(positions.device))
        if key not in turns:  # layers turn alike
            turns[key] = mean_rotation(rope, future, d, positions.device)
        turn = turns[key]
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
    group = hq // view.heads
    return mean.view(b, view.heads, group, d), covariance.view(b, view.heads, group, d, d)


def mean_rotation(rope: Rope, future: int, size: int, device: torch.device) -> Float[Tensor, "D D"]:
    """The mean of the rotations by 0, 1, ... future - 1 positions, as a matrix; not a rotation itself."""
    basis = torch.eye(size, device=device, dtype=torch.float32).repeat_interleave(future, 0)[None, None]  # 1 1 D*F D
    steps = torch.arange(future, device=device).repeat(size)[None, None]
    return rope.shift(basis, steps).view(size, future, size).mean(1).T


def expected_attention(
    view: LayerView,
    mean: Float[Tensor, "B H G D"],
    covariance: Float[Tensor, "B H G D D"],
    among: Bool[Tensor, "B H T"],
) -> Float[Tensor, "B H G T"]:
    """softmax over the keys `among` of log E exp(q k), where q is Gaussian: q k by the mean, and half its variance."""
    scale = view.place.scale
    logits = []
    for keys in torch.split(view.keys, BLOCK_TOKENS, 2):
        keys = keys.float()[:, :, None] * scale  # B H 1 T D
        logits.append((keys @ mean[..., None])[..., 0] + (keys @ covariance).mul_(keys).sum(-1) / 2)
    expected = torch.cat(logits, -1)
    if LOG_MASS in view.columns:
        expected = expected + view.columns[LOG_MASS][:, :, None]
    return expected.masked_fill(~among[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
