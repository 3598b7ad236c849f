"""`compare` against the same numbers by hand."""

import pytest
import torch

import kvfold
from kvfold.evaluation.agreement import agreement
from kvfold.evaluation.compare import compare
from kvfold.hf.cache import Cache


@torch.no_grad()
def forced(model, method, ids, said):
    """The logits before each of the tokens that the full cache said, one by one."""
    cache, logits = Cache(model, method), []
    for part in (ids, *said[:, :-1].split(1, dim=1)):
        logits.append(model(input_ids=part, past_key_values=cache).logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("method", "start"), [("streamingllm(budget=16)", 1), ("h2o(budget=16)", 1), ("jrt-prompt", 0)]
)
def test_the_first_token_counts_where_the_method_reads_the_prompt_in_its_own_way(tiny, method, start):
    """Out of a pass that leaves the prompt alone it is exact for every method."""
    model, tokenizer = kvfold.load(str(tiny), progress=False)
    ids = torch.randint(40, 90, (1, 60), generator=torch.Generator().manual_seed(1))
    full, row = compare(model, tokenizer, ids, [method], [0.5], max_new_tokens=6)
    with torch.no_grad():
        said = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 60:]
    assert full.answer == tokenizer.decode(said[0], skip_special_tokens=True).strip()
    truth, other = forced(model, "full", ids, said), forced(model, method, ids, said)
    assert start == 0 or torch.allclose(truth[0], other[0], atol=1e-4)
    expected = agreement(truth[start:], other[start:])
    assert (row.kl, row.top1) == (pytest.approx(expected.kl, rel=1e-3), pytest.approx(expected.top1))
    assert (full.kl, full.top1) == (0.0, 1.0)
