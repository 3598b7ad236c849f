"""A prompt and a further turn read in parts: every method keeps the tokens, and gives the logits, of one pass."""

from typing import Any

import torch
from torch import Tensor

import kvfold
from calibrated import SMALL
from families import LIMITED, METHODS, each
from models import VOCAB, feed, grow, subject, tokens


def read(slug: str, name: str, size: int, lengths: tuple[int, ...], **more: Any) -> tuple[list[Tensor], list[Any]]:
    """Last logits and kept tokens after a prompt, and after generated tokens and a turn that is longer than a part."""
    options = {**({"budget": 0.5} if slug in LIMITED else {}), **SMALL.get(slug, {}), **more}
    model = subject(name)
    cache = kvfold.Cache(model, slug, part_size=size, **options)
    ids, mask = tokens(*lengths).values()
    forced = torch.randint(3, VOCAB, (len(lengths), 3), generator=torch.Generator().manual_seed(9))
    logits, kept = [], []
    for new in (ids, *forced[..., None].unbind(1), tokens(*(19 for _ in lengths), seed=5)["input_ids"]):
        mask = mask if new is ids else grow(mask, new.shape[1])
        logits.append(feed(model, cache, new, mask)[:, -1:])
        if new.shape[1] > 1:
            kept.append([cache.kept(core.layer) for core in cache.paged])
    return logits, kept


@each(METHODS, name=["llama", "gemma3"], lengths=[(41,), (41, 23)])
def test_parts_are_one_pass_over_a_prompt_and_a_turn(slug, name, lengths):
    (whole, kept), (parts, in_parts) = (read(slug, name, size, lengths) for size in (0, 8))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)
    assert in_parts == kept


@each(["streamingllm", "lacache"], name=["llama", "gemma3"], lengths=[(41,), (41, 23)])
def test_parts_are_one_pass_where_positions_are_those_of_the_cache(slug, name, lengths):
    whole, parts = (read(slug, name, size, lengths, positions="compact")[0] for size in (0, 8))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, atol=2e-4, rtol=0)
