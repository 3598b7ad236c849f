"""INT4 against a loop: a page of keys has a scale for each channel, a value one for each run of channels."""

import pytest
import torch

import kvfold
from kvfold.methods.int4 import PagedInt4
from models import dynamic, feed, follow, reference, subject, tokens


def rounded(numbers: torch.Tensor) -> torch.Tensor:
    """Sixteen steps from the least to the most of these numbers."""
    low, high = numbers.min(), numbers.max()
    scale = (high - low) / 15 if high > low else torch.tensor(1.0)
    return low + scale * ((numbers - low) / scale).round().clamp(0, 15)


def held(cache, layer: int = 0):
    chunk = cache.paged[layer].stored.tokens()[0]
    return chunk.keys, chunk.values


@pytest.mark.parametrize(("length", "pages"), [(15, 0), (16, 1), (40, 4), (47, 4), (48, 5)])
def test_pages_and_tail_against_a_loop(length, pages):
    """Pages of 8 tokens, as soon as 8 newer ones stand behind them; the tail as the model made it."""
    model, method = subject("llama"), PagedInt4(group=8, channels=4, tail=8)
    cache, plain = kvfold.Cache(model, method), kvfold.Cache(model, "full")
    for each in (cache, plain):
        feed(model, each, *tokens(length).values())
    (keys, values), (true_keys, true_values) = held(cache), held(plain)
    for head in range(2):
        for page in range(pages):
            here = slice(8 * page, 8 * page + 8)
            for channel in range(16):
                expected = rounded(true_keys[0, head, here, channel])
                torch.testing.assert_close(keys[0, head, here, channel], expected, atol=1e-5, rtol=1e-5)
            for token in range(8 * page, 8 * page + 8):
                for first in range(0, 16, 4):
                    some = slice(first, first + 4)
                    expected = rounded(true_values[0, head, token, some])
                    torch.testing.assert_close(values[0, head, token, some], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(keys[:, :, 8 * pages :], true_keys[:, :, 8 * pages :])
    assert torch.equal(values[:, :, 8 * pages :], true_values[:, :, 8 * pages :])


def test_while_everything_is_in_the_tail_it_is_the_full_cache():
    prompt, steps = tokens(20, 13), torch.arange(5, 11).view(2, 3)
    model = subject("llama")
    got = follow(model, kvfold.Cache(model, "int4"), *prompt.values(), steps)
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), steps)
    torch.testing.assert_close(got, truth, atol=1e-4, rtol=0)


def test_bytes():
    """Half a byte a number, two numbers a channel and page, two a run of channels: .39 of bfloat16, with the tail."""
    model = subject("llama", torch.bfloat16)
    cache = kvfold.Cache(model, "int4(group=32, channels=16, tail=32)")
    feed(model, cache, *tokens(640).values())
    assert 0.3 < cache.nbytes / cache.dense_nbytes < 0.65


def test_an_eviction_at_every_step_needs_requantise():
    with pytest.raises(ValueError, match="requantise=True"):
        kvfold.parse("h2o(budget=0.5) | int4")
    assert kvfold.parse("h2o(budget=0.5) | int4(requantise=True)").format.traits.requantises


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 7}, "group=7"), ({"group": 9}, "group=9 must be even"), ({"channels": 0}, "channels=0"),
        ({"tail": -1}, "tail=-1"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        PagedInt4(**options)
