"""Tokens fold into the likest that stays by the mean attention that each got, and it takes over their attention."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvfold.formats import LOG_MASS
from kvfold.merges.absorb import absorb, at_home, log_mass, over_set
from kvfold.merges.route import nearest
from kvfold.views import LayerView
from kvfold.views.decisions import Amend

UNSEEN = 1e-9
"""The mean attention of a token that nobody looked at: what folds into one would else outweigh all others."""
TWINS = 0.95
"""The cosine from which two tokens are alike enough to fold whichever got more attention."""


def fold_by_attention(
    view: LayerView,
    kept: Bool[Tensor, "B H T"],
    attention: Float[Tensor, "B H T"],
    queries: Float[Tensor, "B H T"],
    threshold: float,
) -> tuple[Amend, Float[Tensor, "B H T"], dict[str, Tensor]]:
    """What is written, the attention that each token stands for now, and the column of masses.

    A token that does not stay goes to the kept one with the most similar key, from a cosine of `threshold` on; what all
    keys of a head have in common is taken off first, since a softmax does not see it. One that got more attention than
    its taker is dropped unless they are twins: a value that few queries ask for, as a needle's, is not to be outvoted.
    The taker keeps its key; its value becomes the mean weighted by `attention / queries`, and the log of the ratio of
    the whole weight to its own is added to its logits.
    """
    keys = view.keys.float().masked_fill(~view.valid[..., None], 0.0)
    keys = keys - keys.sum(2, keepdim=True) / view.count.clamp(min=1)[..., None, None]
    home, cosine = nearest(view.valid & ~kept if threshold <= 1.0 else torch.zeros_like(kept), kept, keys)
    weight = (attention / queries.clamp(min=1.0)).clamp(min=UNSEEN)
    goes = (cosine >= threshold) & ((weight.gather(-1, home) >= weight) | (cosine >= TWINS))
    home = torch.where(goes, home, at_home(home))
    total, takes = over_set(weight, home), home == at_home(home)
    mass = log_mass(view) + torch.where(takes, (total / weight).log(), 0.0)
    amend = absorb(view, home, None, weight / total)
    return amend, torch.where(takes, total * queries, attention), {LOG_MASS: mass}
