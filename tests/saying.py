"""Text fed to a model and its cache as a user's generation would be: token by token, all logits kept."""

import torch

from models import feed


def read(model, cache, ids):
    """Logits (B, N, V) of tokens (B, N) without padding, behind what the cache has read."""
    return feed(model, cache, ids, torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.int64))


def say(model, cache, steps, mask=None):
    """Feed tokens (B, N) one by one; all logits (B, N, V). `mask`: of what was read before, None: no padding."""
    found = []
    for step in steps.T:
        if mask is None:
            found.append(read(model, cache, step[:, None]))
        else:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            found.append(feed(model, cache, step[:, None], mask))
    return torch.cat(found, 1)


def kept(cache):
    return [cache.kept(core.layer) for core in cache.paged]
