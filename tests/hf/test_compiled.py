"""Models whose forward is compiled: kvfold's part runs as it is written, and the answers are the same."""

import pytest
import torch

import kvfold
from models import build, subject, tokens


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name, part):
    model = build(name)
    inner = model if part == "model" else model.model
    inner.forward = torch.compile(inner.forward, backend="eager")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,part,method",
    [
        ("llama", "model", "full"),
        ("llama", "body", "h2o"),
        ("gemma3", "model", "h2o"),
        ("llama", "model", "kivi(residual=32)"),
    ],
)
def test_a_compiled_forward_says_what_it_says(name, part, method):
    prompt, options = tokens(40, 30), {"max_new_tokens": 5, "do_sample": False}
    plain, cache = kvfold.Cache(subject(name), method), kvfold.Cache(model := compiled(name, part), method)
    expected = subject(name).generate(**prompt, past_key_values=plain, **options)
    assert torch.equal(model.generate(**prompt, past_key_values=cache, **options), expected)
    assert cache.kept(len(cache.layers) - 1) == plain.kept(len(plain.layers) - 1)
