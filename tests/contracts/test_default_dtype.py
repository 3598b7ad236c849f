"""What torch's default dtype is, is the caller's affair: every method keeps and says what it does under float32."""

import pytest
import torch

import kvfold
from families import METHODS
from models import build, greedy, subject, tokens

DTYPES = [torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def default():
    """Sets torch's default for the length of a test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def said(method, name="llama", dtype=torch.float32):
    model, slug = subject(name, dtype), method.split("(")[0]
    options = {"budget": 0.5} if "budget" in next(i.options for i in kvfold.list_methods() if i.slug == slug) else {}
    cache = kvfold.Cache(model, method, **options)
    ids, logits = greedy(model, cache, *tokens(48, 40).values(), 6)
    return ids, logits, cache.kept(0)


@pytest.mark.parametrize("number,method", list(enumerate(METHODS)), ids=METHODS)
def test_a_method_does_what_it_does(default, number, method):
    expected = said(method)
    default(DTYPES[number % 3])
    found = said(method)
    assert torch.equal(found[0], expected[0]) and found[2] == expected[2]
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("method", ["full", "h2o", "kvmerger", "kivi(residual=32)"])
def test_models_in_sixteen_bits(default, method, kind):
    expected = said(method, dtype=torch.bfloat16)
    default(kind)
    assert torch.equal(said(method, dtype=torch.bfloat16)[0], expected[0])


@pytest.mark.parametrize("kind", DTYPES)
def test_the_first_cache_of_a_model(default, kind):
    """Kernels are compiled, and a model is looked at, under the caller's default too."""
    default(kind)
    model = build("qwen3")
    assert model.generate(**tokens(30), past_key_values=kvfold.Cache(model, "kvfold"), max_new_tokens=3).shape[1] == 33


@pytest.mark.parametrize("method", METHODS)
def test_models_in_float64(method):
    """Attention over pages is float32's; nothing else of it is narrowed without a word."""
    ids, logits, kept = said(method, dtype=torch.float64)
    expected = said(method)
    assert logits.dtype == torch.float64
    assert torch.equal(ids, expected[0]) and kept == expected[2]
    most = 1e-2 if method == "fp8" else 1e-3  # a number may lie so that it becomes the code above, or below
    torch.testing.assert_close(logits.float(), expected[1], rtol=most, atol=most)
