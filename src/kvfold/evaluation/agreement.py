"""Agreement with the full cache: how far a compressed cache moves the next-token distribution."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """Over N tokens, teacher-forced: mean KL(full || compressed) in nats, and the share of equal greedy tokens."""

    kl: float
    top1: float
    tokens: int


def divergence(
    full: Float[Tensor, "*N V"], other: Float[Tensor, "*N V"]
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """KL(full || other) in nats of each pair of log-probabilities, and 1 where both have the same greedy token."""
    apart = (full - other).masked_fill(full.isneginf(), 0.0)  # a probability of 0 adds nothing
    kl = (full.exp() * apart).sum(-1).clamp(min=0.0)
    return kl, (full.argmax(-1) == other.argmax(-1)).float()


def agreement(full: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> Agreement:
    """Compare logits position by position."""
    kl, same = divergence(torch.log_softmax(full.float(), -1), torch.log_softmax(other.float(), -1))
    return Agreement(float(kl.mean()), float(same.mean()), len(full))
