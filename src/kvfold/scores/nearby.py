"""What each token got of the queries that stand close behind it, for each query head (InfLLM)."""

import torch
from jaxtyping import Float
from torch import Tensor

from kvfold.formats import LOG_MASS
from kvfold.ops.attend import blocked
from kvfold.views import LayerView


def looks_nearby(view: LayerView, window: int) -> Float[Tensor, "B H G T"]:
    """The attention of each query head to each token, summed over the pass's queries less than `window` behind it.

    Float32; 0 where there is no token. Attention is that of the pass, over all that its queries saw. Blocks of tokens
    are worked out with the queries that can see them, so that what it costs is linear in the text beyond the window.
    """
    queries = view.queries
    (b, hq, n, d), h, t = queries.states.shape, view.heads, view.valid.shape[-1]
    asks = queries.states.view(b, h, hq // h, n, d).float() * view.place.scale
    lse = queries.lse.view(b, h, hq // h, n).masked_fill(~queries.valid[:, None, None], torch.inf)
    places = queries.positions.masked_fill(~queries.valid, -1)  # B Q
    found = torch.zeros(b, h, hq // h, t, dtype=torch.float32, device=asks.device)
    step = max(16, blocked.BLOCK_ELEMENTS // max(1, b * hq * n))
    for start in range(0, t, step):
        at, valid = view.positions[..., start : start + step], view.valid[..., start : start + step]
        if not bool(valid.any()):
            continue
        first, last = int(at[valid].min()), int(at[valid].max()) + window
        some = ((places >= first) & (places < last)).any(0).nonzero()[:, 0]
        if not len(some):
            continue
        picked = slice(int(some[0]), int(some[-1]) + 1)
        logits = asks[..., picked, :] @ view.keys[:, :, None, start : start + step].float().mT  # B H G Q' T'
        if LOG_MASS in view.columns:
            logits = logits + view.columns[LOG_MASS][:, :, None, None, start : start + step]
        behind = places[:, None, picked, None] - at[:, :, None]  # B H Q' T'
        sees = (behind >= 0) & (behind < window) & valid[:, :, None]
        shares = torch.exp(logits - lse[..., picked, None]).masked_fill(~sees[:, :, None], 0.0)
        found[..., start : start + step] = shares.sum(3)
    return found
