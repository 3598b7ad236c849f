"""Caches that adopt one prefill: each goes on as if it had read the prompt alone."""

import pytest
import torch

import kvfold
from kvfold.hf.shared_prefill import prefill_many
from models import dynamic, feed, follow, grow, positions, reference, subject, tokens


@pytest.mark.parametrize("name", ["llama", "gemma3", "mistral", "qwen3-next"])
def test_what_lies_beside_the_pages_is_each_caches_own(name):
    """Windows and recurrent states change as a cache reads on."""
    prompt, model = tokens(40, 31), subject(name)
    caches = [kvfold.Cache(model, "full") for _ in range(3)]
    prefill_many(model, {**prompt, "position_ids": positions(prompt["attention_mask"], 40)}, caches)
    said = [torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for cache, steps in zip(caches, said, strict=True):
        want = follow(reference(name), dynamic(reference(name)), *prompt.values(), steps)[:, 1:]
        mask, got = prompt["attention_mask"], []
        for step in steps.split(1, dim=1):
            mask = grow(mask)
            got.append(feed(model, cache, step, mask))
        torch.testing.assert_close(torch.cat(got, 1), want, atol=2e-4, rtol=0)
