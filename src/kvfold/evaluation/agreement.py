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


def agreement(full: Float[Tensor, "N V"], other: Float[Tensor, "N V"]) -> Agreement:
    """Compare logits position by position."""
    p, q = torch.log_softmax(full.float(), -1), torch.log_softmax(other.float(), -1)
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
    same = (full.argmax(-1) == other.argmax(-1)).float()
    return Agreement(float(kl.mean()), float(same.mean()), len(full))
