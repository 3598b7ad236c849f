"""Where in a prompt the tokens stand that a cache still holds."""

import numpy as np
import torch

from kvfold.hf.cache import Cache

BINS = 64


def kept_share(cache: Cache, tokens: np.ndarray, bins: int = BINS) -> list[list[float]]:
    """For each row: the share of (layer, KV head, token) that is held, in at most `bins` equal parts of its prompt.

    `tokens` (B,) are the prompts' lengths. A merged token counts where its method says that it stands.
    """
    counts = [min(bins, int(n)) for n in tokens]
    held = [np.zeros(n) for n in counts]
    heads = 0
    for core in cache.paged:
        stored, _ = core.stored.tokens()
        positions, valid = stored.positions.cpu(), stored.valid.cpu()
        heads += valid.shape[1]
        for row, n in enumerate(tokens):
            at = positions[row][valid[row]].long()
            at = at[at < int(n)]
            held[row] += torch.bincount(at * counts[row] // int(n), minlength=counts[row]).numpy()
    found = []
    for row, n in enumerate(tokens):
        sizes = np.bincount(np.arange(int(n)) * counts[row] // int(n), minlength=counts[row]) * max(heads, 1)
        found.append([round(float(x), 3) for x in held[row] / sizes])
    return found
