"""KIVI against a loop: a page of keys has a scale for each channel, a value one for each run of channels."""

import pytest
import torch

import kvfold
from kvfold.formats import POSITION, Chunk, Kivi, Spec
from kvfold.methods.kivi import KIVI
from models import dynamic, feed, follow, reference, subject, tokens


def rounded(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """2^bits steps from the least to the most of these numbers."""
    low, high, most = numbers.min(), numbers.max(), 2**bits - 1
    scale = (high - low) / most if high > low else torch.tensor(1.0)
    return low + scale * ((numbers - low) / scale).clamp(0, most).round()


def held(cache, layer: int = 0):
    chunk = cache.paged[layer].stored.tokens()[0]
    return chunk.keys, chunk.values


@pytest.mark.parametrize(
    ("length", "pages", "bits"), [(15, 0, 4), (16, 1, 2), (40, 4, 4), (47, 4, 3), (48, 5, 8), (40, 4, 2)]
)
def test_pages_and_residual_against_a_loop(length, pages, bits):
    """Pages of 8 tokens, as soon as 8 newer ones stand behind them; the residual as the model made it."""
    model, method = subject("llama"), KIVI(bits, group=8, channels=4, residual=8)
    cache, plain = kvfold.Cache(model, method), kvfold.Cache(model, "full")
    for each in (cache, plain):
        feed(model, each, *tokens(length).values())
    (keys, values), (true_keys, true_values) = held(cache), held(plain)
    for head in range(2):
        for page in range(pages):
            here = slice(8 * page, 8 * page + 8)
            for channel in range(16):
                expected = rounded(true_keys[0, head, here, channel], bits)
                torch.testing.assert_close(keys[0, head, here, channel], expected, atol=1e-5, rtol=1e-5)
            for token in range(8 * page, 8 * page + 8):
                for first in range(0, 16, 4):
                    some = slice(first, first + 4)
                    expected = rounded(true_values[0, head, token, some], bits)
                    torch.testing.assert_close(values[0, head, token, some], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(keys[:, :, 8 * pages :], true_keys[:, :, 8 * pages :])
    assert torch.equal(values[:, :, 8 * pages :], true_values[:, :, 8 * pages :])


def test_what_is_rounded_and_when():
    """300 tokens with the paper's group and residual: whole pages of 32 behind which 128 are left; so after 84 more.

    (The paper: 256 keys and 172 values, then 384 keys and 256 values.)
    """
    model, found = subject("llama"), []
    for steps, coded in ((0, 160), (84, 256)):
        cache = kvfold.Cache(model, "kivi(bits=2, group=32, residual=128)")
        follow(model, cache, *tokens(300).values(), torch.arange(steps)[None] % 60 + 1)
        segment = cache.paged[0].stored.segments[0][1]
        assert (segment.coded.counts() == coded).all() and (segment.tail.counts() == 300 + steps - coded).all()
        found.append(held(cache))
    for early, late in zip(*found, strict=True):
        assert torch.equal(early[:, :, :160], late[:, :, :160])  # a code is final


def test_keys_that_come_one_by_one_are_rounded_too():
    """A group of one token would be exact: the error behind the first flush is that of groups."""
    model, steps = subject("llama"), torch.arange(5, 45)[None]
    caches = [kvfold.Cache(model, method) for method in ("kivi(bits=2, group=8, channels=8, residual=8)", "full")]
    for cache in caches:
        follow(model, cache, *tokens(4).values(), steps)
    (keys, _), (true, _) = (held(cache) for cache in caches)
    assert ((keys - true)[:, :, :32].abs().amax((0, 1, 3)) > 1e-3).all() and torch.equal(
        keys[:, :, 36:], true[:, :, 36:]
    )


def test_a_channel_that_stands_out_hurts_only_itself_in_keys_and_a_token_only_itself_in_values():
    keys = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    values = keys.clone()
    keys[..., 5] = keys[..., 5] * 50 + 100
    values[:, :, 7] = values[:, :, 7] * 50 + 100
    errors = []
    for k, v in ((keys, values), (values, keys)):  # as the paper has it, and the other way round
        at = torch.arange(32, dtype=torch.int32).expand(1, 1, 32)
        chunk = Chunk(k, v, torch.ones(1, 1, 32, dtype=torch.bool), {POSITION: at})
        segment = Kivi(4, residual=0).open(Spec.of(chunk))
        segment.append(chunk, even=True)
        found = segment.dense()
        errors.append(((found.keys - k).abs(), (found.values - v).abs()))
    (right_keys, right_values), (wrong_keys, wrong_values) = errors
    channels, kept = torch.arange(32) != 5, torch.arange(32) != 7
    for right, wrong in (
        (right_keys[..., channels], wrong_values[..., channels]),
        (right_values[:, :, kept], wrong_keys[:, :, kept]),
    ):
        assert right.max() < 0.3 and wrong.median() > 5 * right.median()


def test_while_everything_is_in_the_residual_it_is_the_full_cache():
    prompt, steps = tokens(20, 13), torch.arange(5, 11).view(2, 3)
    model = subject("llama")
    got = follow(model, kvfold.Cache(model, "kivi(bits=2)"), *prompt.values(), steps)
    truth = follow(reference("llama"), dynamic(reference("llama")), *prompt.values(), steps)
    torch.testing.assert_close(got, truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("bits", "low", "high"), [(2, 0.2, 0.45), (4, 0.3, 0.6), (8, 0.6, 0.85)])
def test_bytes(bits, low, high):
    """bits / 16 of bfloat16, two float16 a channel and page, two a run of channels, and the residual."""
    model = subject("llama", torch.bfloat16)
    cache = kvfold.Cache(model, f"kivi(bits={bits}, group=32, channels=16, residual=32)")
    feed(model, cache, *tokens(640).values())
    assert low < cache.nbytes / cache.dense_nbytes < high


def test_an_eviction_at_every_step_needs_requantise():
    with pytest.raises(ValueError, match="requantise=True"):
        kvfold.parse("h2o(budget=0.5) | kivi")
    assert kvfold.parse("h2o(budget=0.5) | kivi(requantise=True)").format.traits.requantises


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 must be one of 2, 3, 4, 8"), ({"bits": 16}, "bits=16"), ({"bits": 4.0}, "bits=4.0"),
        ({"group": 7}, "group=7"), ({"group": 9}, "group=9 must be even"), ({"channels": 0}, "channels=0"),
        ({"residual": -1}, "residual=-1"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KIVI(**options)
