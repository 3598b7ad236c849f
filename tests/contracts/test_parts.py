"""A prompt read in parts: every method keeps the tokens, and the model gives the logits, of one pass over it."""

import torch

import kvfold
from calibrated import SMALL
from families import LIMITED, METHODS, each
from models import VOCAB, feed, grow, subject, tokens

PART = 8


def read(slug: str, name: str, part: int, lengths: tuple[int, ...]) -> tuple[kvfold.Cache, list[torch.Tensor]]:
    """A prompt, a few generated tokens and a further turn, which is longer than a part, too."""
    options = {**({"budget": 0.5} if slug in LIMITED else {}), **SMALL.get(slug, {})}
    model = subject(name)
    cache = kvfold.Cache(model, slug, part_size=part, **options)
    prompt, more = tokens(*lengths), tokens(*(19 for _ in lengths), seed=5)["input_ids"]
    ids, mask = prompt.values()
    forced = torch.randint(3, VOCAB, (len(lengths), 3), generator=torch.Generator().manual_seed(9))
    logits = []
    logits.append(feed(model, cache, ids, mask)[:, -1:])
    for column in forced.unbind(1):
        mask = grow(mask)
        logits.append(feed(model, cache, column[:, None], mask))
    kept = [cache.kept(core.layer) for core in cache.paged]
    mask = grow(mask, 19)
    logits.append(feed(model, cache, more, mask)[:, -1:])
    return cache, logits, [*kept, *(cache.kept(core.layer) for core in cache.paged)]


@each(METHODS, name=["llama", "gemma3"], lengths=[(41,), (41, 23)])
def test_parts_are_one_pass(slug, name, lengths):
    whole, parts = read(slug, name, 0, lengths), read(slug, name, PART, lengths)
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)
    assert parts[2] == whole[2]
